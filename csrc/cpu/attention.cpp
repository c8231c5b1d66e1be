// What merge_attention needs beside the weighted sums of forecast.cpp. Compiled once per instruction set (see vec.h).
#include "kernels.h"
#include "vec.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

template <class Format>
void widen(const void* values, int64_t n, float* out) {
  using Element = typename Format::Element;
  const Element* v = static_cast<const Element*>(values);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) Format::store_floats(out + i, Format::load(v + i));
  if (i < n) {
    Element padded[kPair] = {};
    float wide[kPair];
    __builtin_memcpy(padded, v + i, (n - i) * sizeof(Element));
    Format::store_floats(wide, Format::load(padded));
    __builtin_memcpy(out + i, wide, (n - i) * sizeof(float));
  }
}

}  // namespace

extern const AttentionKernels attention_kernels = {
    {widen<Float32>, widen<Float16>, widen<BFloat16>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
