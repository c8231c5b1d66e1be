// residual_l1, l1 and residual_push on contiguous elements. Compiled once per instruction set (see vec.h).
#include "kernels.h"
#include "vec.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

// Sums are laid out alike for every instruction set, so that all give the same bits: element i of a block goes to lane
// i % kLanes in float32, the lanes are added pairwise, and blocks are added in float64. A lane adds up 32 numbers.
constexpr int kLanes = 32;
constexpr int kVectors = kLanes / kWidth;
constexpr int64_t kBlock = 32 * kLanes;

float add_lanes(const Floats* vectors) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, vectors, sizeof lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

struct ResidualTerms {  // inputs: before, after, anchor
  static constexpr int kInputs = 3;
  static Floats difference(const Floats* x) { return (x[1] - x[0]) - x[2]; }
  static Floats scale(const Floats* x) { return x[2]; }
};

struct PlainTerms {  // inputs: previous, current
  static constexpr int kInputs = 2;
  static Floats difference(const Floats* x) { return x[0] - x[1]; }
  static Floats scale(const Floats* x) { return x[0]; }
};

template <class Format, class Terms>
inline void add_group(const typename Format::Element* const* inputs, int64_t offset, Floats* differences,
                      Floats* scales) {
  for (int v = 0; v < kVectors; ++v) {
    Floats x[Terms::kInputs];
    for (int i = 0; i < Terms::kInputs; ++i) x[i] = Format::load(inputs[i] + offset + v * kWidth);
    differences[v] += abs(Terms::difference(x));
    scales[v] += abs(Terms::scale(x));
  }
}

template <class Format, class Terms>
void two_sums(const typename Format::Element* const* inputs, int64_t n, double* sums) {
  using Element = typename Format::Element;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t stop = n - block < kBlock ? n : block + kBlock;
    Floats differences[kVectors] = {}, scales[kVectors] = {};
    int64_t i = block;
    for (; i + kLanes <= stop; i += kLanes) add_group<Format, Terms>(inputs, i, differences, scales);
    if (i < stop) {  // padded with zeros, which add nothing
      Element padded[Terms::kInputs][kLanes] = {};
      const Element* rest[Terms::kInputs];
      for (int t = 0; t < Terms::kInputs; ++t) {
        __builtin_memcpy(padded[t], inputs[t] + i, (stop - i) * sizeof(Element));
        rest[t] = padded[t];
      }
      add_group<Format, Terms>(rest, 0, differences, scales);
    }
    sums[0] += add_lanes(differences);
    sums[1] += add_lanes(scales);
  }
}

template <class Format>
void residual_l1(const void* before, const void* after, const void* anchor, int64_t n, double* sums) {
  using Element = typename Format::Element;
  const Element* inputs[] = {static_cast<const Element*>(before), static_cast<const Element*>(after),
                             static_cast<const Element*>(anchor)};
  two_sums<Format, ResidualTerms>(inputs, n, sums);
}

template <class Format>
void l1(const void* previous, const void* current, int64_t n, double* sums) {
  using Element = typename Format::Element;
  const Element* inputs[] = {static_cast<const Element*>(previous), static_cast<const Element*>(current)};
  two_sums<Format, PlainTerms>(inputs, n, sums);
}

template <class Format>
void residual_push(const void* before, const void* after, int64_t n, void* out) {
  using Element = typename Format::Element;
  const Element* b = static_cast<const Element*>(before);
  const Element* a = static_cast<const Element*>(after);
  Element* o = static_cast<Element*>(out);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Format::store(o + i, Format::load(a + i) - Format::load(b + i));
  if (i < n) {
    Element rest[3][kWidth] = {};
    const int64_t bytes = (n - i) * sizeof(Element);
    __builtin_memcpy(rest[0], b + i, bytes);
    __builtin_memcpy(rest[1], a + i, bytes);
    Format::store(rest[2], Format::load(rest[1]) - Format::load(rest[0]));
    __builtin_memcpy(o + i, rest[2], bytes);
  }
}

}  // namespace

extern const ResidualKernels residual_kernels = {
    {residual_l1<Float32>, residual_l1<Float16>, residual_l1<BFloat16>},
    {l1<Float32>, l1<Float16>, l1<BFloat16>},
    {residual_push<Float32>, residual_push<Float16>, residual_push<BFloat16>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
