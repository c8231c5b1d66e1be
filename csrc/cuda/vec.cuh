// 16-byte accesses and conversions. Arithmetic is in fp32 and results are rounded once, to the nearest.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "dtype.h"

namespace cachedit {
namespace cuda {

template <DType> struct ElementOf;
template <> struct ElementOf<kFloat32> { using type = float; };
template <> struct ElementOf<kFloat16> { using type = __half; };
template <> struct ElementOf<kBFloat16> { using type = __nv_bfloat16; };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// What a thread moves at once.
template <class T, int kCount = 16 / sizeof(T)>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  static constexpr int kSize = kCount;
  T at[kCount];
};

// As many of the vector's elements as there are, zeros for the rest.
template <class V, class T>
__device__ inline V load(const T* data, int64_t count, bool wide) {
  if (wide && count >= V::kSize) return *reinterpret_cast<const V*>(data);
  V x;
#pragma unroll
  for (int i = 0; i < V::kSize; ++i) x.at[i] = i < count ? data[i] : T{};
  return x;
}

template <class V, class T>
__device__ inline void store(T* data, const V& x, int64_t count, bool wide) {
  if (wide && count >= V::kSize) {
    *reinterpret_cast<V*>(data) = x;
    return;
  }
#pragma unroll
  for (int i = 0; i < V::kSize; ++i) {
    if (i < count) data[i] = x.at[i];
  }
}

// Whether rows can be accessed 16 bytes at a time.
template <class T>
__device__ inline bool is_wide(const void* data, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * static_cast<int64_t>(sizeof(T)))) % 16 == 0;
}

}  // namespace cuda
}  // namespace cachedit
