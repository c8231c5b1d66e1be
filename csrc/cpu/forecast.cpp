// residual_forecast on contiguous elements. Compiled once per instruction set (see vec.h).
#include "e4m3.h"
#include "kernels.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

constexpr int kPairs = 2;  // in flight, to hide latencies
constexpr int kGroup = kPairs * kPair;

// Stored is what slots are read as: Format, or E4M3<Format>.

inline Pair scaled(float factor, Pair x) { return {factor * x.a, factor * x.b}; }

inline void add_term(float factor, Pair x, Pair* total) {
  total->a += factor * x.a;
  total->b += factor * x.b;
}

template <class Format, class Stored>
inline void forecast_group(const typename Format::Element* hidden, float base,
                           const typename Stored::Element* const* slots, const float* weights, int64_t terms,
                           int64_t offset, typename Format::Element* out) {
  Pair total[kPairs] = {};
  if (hidden != nullptr) {
    for (int p = 0; p < kPairs; ++p) total[p] = scaled(base, Format::load(hidden + p * kPair));
  }
  for (int64_t k = 0; k < terms; ++k) {
    const typename Stored::Element* slot = slots[k] + offset;
    for (int p = 0; p < kPairs; ++p) add_term(weights[k], Stored::load(slot + p * kPair), &total[p]);
  }
  for (int p = 0; p < kPairs; ++p) Format::store(out + p * kPair, total[p]);
}

// The last, incomplete group: every input is widened from a padded copy.
template <class Format, class Stored>
inline void forecast_rest(const typename Format::Element* hidden, float base,
                          const typename Stored::Element* const* slots, const float* weights, int64_t terms,
                          int64_t offset, int64_t count, typename Format::Element* out) {
  using Element = typename Format::Element;
  using StoredElement = typename Stored::Element;
  const int64_t bytes = count * sizeof(Element);
  Element padded[kGroup] = {};
  Pair total[kPairs] = {};
  if (hidden != nullptr) {
    __builtin_memcpy(padded, hidden, bytes);
    for (int p = 0; p < kPairs; ++p) total[p] = scaled(base, Format::load(padded + p * kPair));
  }
  for (int64_t k = 0; k < terms; ++k) {
    StoredElement slot[kGroup] = {};
    __builtin_memcpy(slot, slots[k] + offset, count * sizeof(StoredElement));
    for (int p = 0; p < kPairs; ++p) add_term(weights[k], Stored::load(slot + p * kPair), &total[p]);
  }
  for (int p = 0; p < kPairs; ++p) Format::store(padded + p * kPair, total[p]);
  __builtin_memcpy(out, padded, bytes);
}

template <class Format, class Stored>
void residual_forecast(const void* hidden, float base, const void* const* slots, const float* weights, int64_t terms,
                       int64_t n, void* out) {
  using Element = typename Format::Element;
  const Element* h = static_cast<const Element*>(hidden);
  const auto* s = reinterpret_cast<const typename Stored::Element* const*>(slots);
  Element* o = static_cast<Element*>(out);
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    forecast_group<Format, Stored>(h != nullptr ? h + i : nullptr, base, s, weights, terms, i, o + i);
  }
  if (i < n) forecast_rest<Format, Stored>(h != nullptr ? h + i : nullptr, base, s, weights, terms, i, n - i, o + i);
}

}  // namespace

extern const ForecastKernels forecast_kernels = {
    {residual_forecast<Float32, Float32>, residual_forecast<Float16, Float16>, residual_forecast<BFloat16, BFloat16>},
    {residual_forecast<Float32, E4M3<Float32>>, residual_forecast<Float16, E4M3<Float16>>,
     residual_forecast<BFloat16, E4M3<BFloat16>>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
