// merge_attention.
#include <cmath>

#include "cuda/launch.cuh"

namespace cachedit {
namespace cuda {
namespace {

struct Weights {
  float first, second, lse;
};

// Softmax weights of two results by their logsumexp. Empty sets of keys (-inf) weigh nothing; NaN passes through.
__device__ Weights weigh(float x, float y) {
  const bool swap = !(x >= y);
  const bool no_x = x == -INFINITY, no_y = y == -INFINITY;
  const float decay = no_x && no_y ? 0.0f : expf(-fabsf(x - y));
  const float total = 1.0f + decay;
  const float larger = 1.0f / total, smaller = decay / total;
  return {no_x ? 0.0f : (swap ? smaller : larger), no_y ? 0.0f : (swap ? larger : smaller),
          (swap ? y : x) + log1pf(decay)};
}

__device__ inline int64_t offset(const Attention& tensor, int64_t b, int64_t l, int64_t h) {
  return b * tensor.strides[0] + l * tensor.strides[1] + h * tensor.strides[2];
}

__device__ inline bool aligned(const Attention& tensor, int64_t bytes, int64_t element_size) {
  const int64_t strides = tensor.strides[0] | tensor.strides[1] | tensor.strides[2];
  return (reinterpret_cast<int64_t>(tensor.data) | strides * element_size) % bytes == 0;
}

// Each thread merges 8 elements (4 of float32 alone) of a row, a row being a token and head.
template <class T, class T2>
__device__ void merge_rows(const Merge& call) {
  constexpr int kCount = 16 / (sizeof(T) < sizeof(T2) ? sizeof(T) : sizeof(T2));
  using V = Vector<T, kCount>;
  using V2 = Vector<T2, kCount>;
  const int64_t columns = call.head_dim;
  // 32 bits suffice, which the launch has made sure of, and are divided in a fraction of the time.
  const unsigned pieces = columns == 0 ? 1 : static_cast<unsigned>(ceil_div(columns, kCount));
  const unsigned heads = static_cast<unsigned>(call.heads), length = static_cast<unsigned>(call.length);
  const int64_t items = call.batch * call.length * call.heads * pieces;
  const bool wide = columns % kCount == 0 && aligned(call.out, 16, sizeof(T)) && aligned(call.out2, 16, sizeof(T2));
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < items; i += gridDim.x * int64_t{kThreads}) {
    const unsigned item = static_cast<unsigned>(i), token = item / pieces / heads;
    const int64_t row = item / pieces, column = int64_t{item % pieces} * kCount;
    const int64_t h = item / pieces % heads, l = token % length, b = token / length;
    const Weights weights = weigh(static_cast<const float*>(call.lse.data)[offset(call.lse, b, l, h)],
                                  static_cast<const float*>(call.lse2.data)[offset(call.lse2, b, l, h)]);
    if (column == 0) call.merged_lse[row] = weights.lse;
    V x{};
    V2 y{};
    if (weights.first != 0.0f) {
      x = load<V>(static_cast<const T*>(call.out.data) + offset(call.out, b, l, h) + column, columns - column, wide);
    }
    if (weights.second != 0.0f) {
      y = load<V2>(static_cast<const T2*>(call.out2.data) + offset(call.out2, b, l, h) + column, columns - column, wide);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x.at[i] = narrow<T>(weights.first * widen(x.at[i]) + weights.second * widen(y.at[i]));
    }
    store(static_cast<T*>(call.merged) + row * columns + column, x, columns - column, wide);
  }
}

// A thread waits for the weights before it asks for what they weigh, so there are more threads.
constexpr int kMergeBlocks = 6;

__global__ void __launch_bounds__(kThreads, kMergeBlocks)
    merge_kernel(const __grid_constant__ Merge call) {
  with_type(call.dtype2, [&](auto type2) {
    using T2 = decltype(type2);
    if (call.dtype == kFloat32) {
      merge_rows<float, T2>(call);
    } else {
      merge_rows<T2, T2>(call);
    }
  });
}

}  // namespace
}  // namespace cuda
}  // namespace cachedit

using namespace cachedit::cuda;

const char* cachedit_cuda_merge_attention(const Merge* merge, void* stream) {
  const int64_t rows = merge->batch * merge->length * merge->heads;
  const int64_t per_thread = merge->dtype2 == cachedit::kFloat32 ? 4 : 8;
  const int64_t items = rows * std::max<int64_t>(1, ceil_div(merge->head_dim, per_thread));
  if (items > UINT32_MAX) return "there are 2^32 vectors of 16 bytes or more to merge";
  return launch_over(ceil_div(items, kThreads), merge_kernel, *merge, stream, kMergeBlocks);
}
