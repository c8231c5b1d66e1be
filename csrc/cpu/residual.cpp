// residual_l1, l1 and residual_push on contiguous elements. Compiled once per instruction set (see vec.h).
#include "e4m3.h"
#include "kernels.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

// Sums are laid out alike for every instruction set, so that all give the same bits: element i of a call goes to lane
// i % kLanes, whose float32 sum over a block of 64 elements of its own is added to the lane's float32 total; in the end
// the lanes are added pairwise. A call takes some thousand elements, and callers add up calls in float64.
constexpr int kLanes = 32;
constexpr int kPairs = kLanes / kPair;
constexpr int64_t kBlock = 64 * kLanes;

template <class Format>
float add_lanes(const Pair* sums) {
  float lanes[kLanes];
  for (int p = 0; p < kPairs; ++p) Format::store_floats(lanes + p * kPair, sums[p]);
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
inline void add_group(const typename Format::Element* const* inputs, int64_t offset, Pair* differences, Pair* scales) {
  for (int p = 0; p < kPairs; ++p) {
    Floats a[Terms::kInputs], b[Terms::kInputs];
    for (int i = 0; i < Terms::kInputs; ++i) {
      const Pair x = Format::load(inputs[i] + offset + p * kPair);
      a[i] = x.a;
      b[i] = x.b;
    }
    differences[p].a += abs(Terms::difference(a));
    differences[p].b += abs(Terms::difference(b));
    scales[p].a += abs(Terms::scale(a));
    scales[p].b += abs(Terms::scale(b));
  }
}

template <class Format, class Terms>
void two_sums(const typename Format::Element* const* inputs, int64_t n, double* sums) {
  using Element = typename Format::Element;
  Pair total_differences[kPairs] = {}, total_scales[kPairs] = {};
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t stop = n - block < kBlock ? n : block + kBlock;
    Pair differences[kPairs] = {}, scales[kPairs] = {};
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
    for (int p = 0; p < kPairs; ++p) {
      total_differences[p].a += differences[p].a;
      total_differences[p].b += differences[p].b;
      total_scales[p].a += scales[p].a;
      total_scales[p].b += scales[p].b;
    }
  }
  sums[0] += add_lanes<Format>(total_differences);
  sums[1] += add_lanes<Format>(total_scales);
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

inline Pair minus(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }

template <class Format>
inline void push_pair(const typename Format::Element* before, const typename Format::Element* after,
                      typename Format::Element* out) {
  Format::store(out, minus(Format::load(after), Format::load(before)));
}

template <class Format>
void residual_push(const void* before, const void* after, int64_t n, void* out) {
  using Element = typename Format::Element;
  const Element* b = static_cast<const Element*>(before);
  const Element* a = static_cast<const Element*>(after);
  Element* o = static_cast<Element*>(out);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) push_pair<Format>(b + i, a + i, o + i);
  if (i < n) {
    Element rest[3][kPair] = {};
    const int64_t bytes = (n - i) * sizeof(Element);
    __builtin_memcpy(rest[0], b + i, bytes);
    __builtin_memcpy(rest[1], a + i, bytes);
    push_pair<Format>(rest[0], rest[1], rest[2]);
    __builtin_memcpy(o + i, rest[2], bytes);
  }
}

template <class Format>
struct Residual {
  Values<Format> before, after;

  Pair load(int64_t i) const { return minus(after.load(i), before.load(i)); }
  Pair load(int64_t i, int64_t count) const { return minus(after.load(i, count), before.load(i, count)); }
};

template <class Format>
float residual_push_float8(const void* before, const void* after, int64_t n, uint8_t* codes) {
  using Element = typename Format::Element;
  const Values<Format> b{static_cast<const Element*>(before)}, a{static_cast<const Element*>(after)};
  return quantize_row<Format>(Residual<Format>{b, a}, n, codes);
}

}  // namespace

extern const ResidualKernels residual_kernels = {
    {residual_l1<Float32>, residual_l1<Float16>, residual_l1<BFloat16>},
    {l1<Float32>, l1<Float16>, l1<BFloat16>},
    {residual_push<Float32>, residual_push<Float16>, residual_push<BFloat16>},
    {residual_push_float8<Float32>, residual_push_float8<Float16>, residual_push_float8<BFloat16>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
