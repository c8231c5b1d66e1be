// Quantising rows to E4M3 and back. Compiled once per instruction set (see vec.h).
#include "e4m3.h"
#include "kernels.h"

namespace cachedit {
namespace CACHEDIT_ISA {
namespace {

template <class Format>
void quantize(const void* values, int64_t rows, int64_t n, uint8_t* codes, float* scales) {
  const auto* x = static_cast<const typename Format::Element*>(values);
  for (int64_t row = 0; row < rows; ++row, x += n, codes += n) {
    scales[row] = quantize_row<Format>(Values<Format>{x}, n, codes);
  }
}

template <class Format>
inline void dequantize_pair(const uint8_t* codes, float scale, typename Format::Element* out) {
  const Pair x = E4M3<Format>::load(codes);
  Format::store(out, {x.a * scale, x.b * scale});
}

template <class Format>
void dequantize(const uint8_t* codes, const float* scales, int64_t rows, int64_t n, void* values) {
  using Element = typename Format::Element;
  Element* out = static_cast<Element*>(values);
  for (int64_t row = 0; row < rows; ++row, codes += n, out += n) {
    const float scale = scales[row];
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) dequantize_pair<Format>(codes + i, scale, out + i);
    if (i < n) {
      uint8_t padded[kPair] = {};
      Element rest[kPair];
      __builtin_memcpy(padded, codes + i, n - i);
      dequantize_pair<Format>(padded, scale, rest);
      __builtin_memcpy(out + i, rest, (n - i) * sizeof(Element));
    }
  }
}

}  // namespace

extern const UlyssesKernels ulysses_kernels = {
    {quantize<Float32>, quantize<Float16>, quantize<BFloat16>},
    {dequantize<Float32>, dequantize<Float16>, dequantize<BFloat16>},
};

}  // namespace CACHEDIT_ISA
}  // namespace cachedit
