// residual_forecast on contiguous elements. Compiled once per instruction set (see vec.h).
#include "kernels.h"
#include "vec.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

constexpr int kVectors = 4;  // in flight, to hide latencies
constexpr int kGroup = kVectors * kWidth;

template <class Format>
inline void forecast_group(const typename Format::Element* hidden, float base,
                           const typename Format::Element* const* slots, const float* weights, int64_t terms,
                           int64_t offset, typename Format::Element* out) {
  Floats total[kVectors] = {};
  if (hidden != nullptr) {
    for (int v = 0; v < kVectors; ++v) total[v] = base * Format::load(hidden + v * kWidth);
  }
  for (int64_t k = 0; k < terms; ++k) {
    const typename Format::Element* slot = slots[k] + offset;
    for (int v = 0; v < kVectors; ++v) total[v] += weights[k] * Format::load(slot + v * kWidth);
  }
  for (int v = 0; v < kVectors; ++v) Format::store(out + v * kWidth, total[v]);
}

// The last, incomplete group: every input is widened from a padded copy.
template <class Format>
inline void forecast_rest(const typename Format::Element* hidden, float base,
                          const typename Format::Element* const* slots, const float* weights, int64_t terms,
                          int64_t offset, int64_t count, typename Format::Element* out) {
  using Element = typename Format::Element;
  const int64_t bytes = count * sizeof(Element);
  Element padded[kGroup] = {};
  Floats total[kVectors] = {};
  if (hidden != nullptr) {
    __builtin_memcpy(padded, hidden, bytes);
    for (int v = 0; v < kVectors; ++v) total[v] = base * Format::load(padded + v * kWidth);
  }
  for (int64_t k = 0; k < terms; ++k) {
    __builtin_memcpy(padded, slots[k] + offset, bytes);
    for (int v = 0; v < kVectors; ++v) total[v] += weights[k] * Format::load(padded + v * kWidth);
  }
  for (int v = 0; v < kVectors; ++v) Format::store(padded + v * kWidth, total[v]);
  __builtin_memcpy(out, padded, bytes);
}

template <class Format>
void residual_forecast(const void* hidden, float base, const void* const* slots, const float* weights, int64_t terms,
                       int64_t n, void* out) {
  using Element = typename Format::Element;
  const Element* h = static_cast<const Element*>(hidden);
  const Element* const* s = reinterpret_cast<const Element* const*>(slots);
  Element* o = static_cast<Element*>(out);
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    forecast_group<Format>(h != nullptr ? h + i : nullptr, base, s, weights, terms, i, o + i);
  }
  if (i < n) forecast_rest<Format>(h != nullptr ? h + i : nullptr, base, s, weights, terms, i, n - i, o + i);
}

}  // namespace

extern const ForecastKernels forecast_kernels = {
    {residual_forecast<Float32>, residual_forecast<Float16>, residual_forecast<BFloat16>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
