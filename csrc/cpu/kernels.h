// The CPU kernels' plain interface: raw pointers to contiguous elements, one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace cachedit {

// Kernels that add sum |difference| and sum |scale| of n elements to sums[0] and sums[1].
using ResidualL1 = void (*)(const void* before, const void* after, const void* anchor, int64_t n, double* sums);
using L1 = void (*)(const void* previous, const void* current, int64_t n, double* sums);

using ResidualPush = void (*)(const void* before, const void* after, int64_t n, void* out);

// One row of n elements as E4M3 codes; returns its scale.
using ResidualPushFloat8 = float (*)(const void* before, const void* after, int64_t n, uint8_t* codes);

// out = base * hidden + sum_k weights[k] * slots[k], terms added in the order of k; hidden may be null: not read then.
// Slots hold elements of hidden's format or, in the table's second row, E4M3 codes.
using ResidualForecast = void (*)(const void* hidden, float base, const void* const* slots, const float* weights,
                                  int64_t terms, int64_t n, void* out);

// Adds the inner products of n elements of each two slots to sums, row by row of the lower triangle.
constexpr int64_t kMaxGramSlots = 16;
using RingGram = void (*)(const void* const* slots, int64_t count, int64_t n, double* sums);

using Widen = void (*)(const void* values, int64_t n, float* out);

// Rows of n elements each. scales[row] = max(amax / 448, 2^-126), codes = E4M3(x / scale); and back: code * scale.
using Quantize = void (*)(const void* x, int64_t rows, int64_t n, uint8_t* codes, float* scales);
using Dequantize = void (*)(const uint8_t* codes, const float* scales, int64_t rows, int64_t n, void* out);

struct ResidualKernels {  // indexed by DType
  ResidualL1 residual_l1[kDTypes];
  L1 l1[kDTypes];
  ResidualPush residual_push[kDTypes];
  ResidualPushFloat8 residual_push_float8[kDTypes];
};

struct ForecastKernels {
  ResidualForecast residual_forecast[kDTypes];
  ResidualForecast residual_forecast_float8[kDTypes];
};

struct GramKernels {
  RingGram ring_gram[kDTypes];
};

struct AttentionKernels {
  Widen widen[kDTypes];
};

struct UlyssesKernels {
  Quantize quantize[kDTypes];
  Dequantize dequantize[kDTypes];
};

// Each instruction set's tables; the namespaces are CMake's names for the sets of compiler flags.
namespace baseline {
extern const ResidualKernels residual_kernels;
extern const ForecastKernels forecast_kernels;
extern const GramKernels gram_kernels;
extern const AttentionKernels attention_kernels;
extern const UlyssesKernels ulysses_kernels;
}  // namespace baseline
namespace avx2 {
extern const ResidualKernels residual_kernels;
extern const ForecastKernels forecast_kernels;
extern const GramKernels gram_kernels;
extern const AttentionKernels attention_kernels;
extern const UlyssesKernels ulysses_kernels;
}  // namespace avx2
namespace avx512 {
extern const ResidualKernels residual_kernels;
extern const ForecastKernels forecast_kernels;
extern const GramKernels gram_kernels;
extern const AttentionKernels attention_kernels;
extern const UlyssesKernels ulysses_kernels;
}  // namespace avx512

// The best set that this CPU runs and CACHEDIT_CPU_CAPABILITY allows. Chosen at the first call.
struct Kernels {
  const char* capability;  // "default", "avx2" or "avx512"
  const ResidualKernels* residual;
  const ForecastKernels* forecast;
  const GramKernels* gram;
  const AttentionKernels* attention;
  const UlyssesKernels* ulysses;
};
const Kernels& kernels();

}  // namespace cachedit
