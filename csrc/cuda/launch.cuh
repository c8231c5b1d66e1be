// What all launches share: blocks of one size, as many as the GPU holds at once, and tiles of rows.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/vec.cuh"

namespace cachedit {
namespace cuda {

constexpr int kThreads = 256;
// Four blocks leave 64 registers to a thread, and keep 64 KB and more in flight on each multiprocessor.
constexpr int kBlocksPerMultiprocessor = 4;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile is what a block takes at once: kVectors vectors of 16 bytes for each thread.
constexpr int kVectors = 2;
constexpr int kTileBytes = kThreads * kVectors * 16;

inline int64_t tile_columns(DType dtype) { return kTileBytes / (dtype == kFloat32 ? 4 : 2); }

template <class T>
struct Tile {  // of a row; thread t takes vectors t, t + kThreads, ...
  static constexpr int64_t kColumns = kTileBytes / sizeof(T);

  int64_t row;
  int64_t start;

  // Which tile of a stream's. Divides, which takes as long as everything else, only where it must.
  __device__ static Tile number(int64_t index, int64_t rows, int64_t columns) {
    if (rows == 1) return {0, index * kColumns};
    if (columns <= kColumns) return {index, 0};
    const int64_t tiles = ceil_div(columns, kColumns), row = index / tiles;
    return {row, (index - row * tiles) * kColumns};
  }
  __device__ int64_t column(int vector) const {
    return start + (vector * kThreads + static_cast<int>(threadIdx.x)) * (16 / static_cast<int>(sizeof(T)));
  }
};

// The blocks that run at once on the current device, so many per multiprocessor.
inline cudaError_t resident_blocks(int per_multiprocessor, int64_t* blocks) {
  constexpr int kDevices = 64;
  static int cached[kDevices] = {};  // written twice with the same value at worst
  int device = 0, multiprocessors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < kDevices && cached[device] != 0) {
    multiprocessors = cached[device];
  } else {
    if (cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
      return error;
    }
    if (device < kDevices) cached[device] = multiprocessors;
  }
  *blocks = int64_t{per_multiprocessor} * multiprocessors;
  return cudaSuccess;
}

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Launches kernel(params) with `blocks` blocks.
template <class Params>
const char* launch(void (*kernel)(Params), int64_t blocks, Params params, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return message(cudaLaunchKernelEx(&config, kernel, params));
}

// What becomes of `tiles` tiles in a persistent grid: each block takes every gridDim-th.
template <class Params>
const char* launch_over(int64_t tiles, void (*kernel)(Params), Params params, void* stream,
                        int blocks_per_multiprocessor = kBlocksPerMultiprocessor) {
  if (tiles == 0) return nullptr;
  int64_t blocks = 0;
  if (cudaError_t error = resident_blocks(blocks_per_multiprocessor, &blocks)) return message(error);
  return launch(kernel, std::min(tiles, blocks), params, stream);
}

// Element types become template parameters: calls f(T{}) for the dtype's type T.
template <class F>
__device__ inline void with_type(DType dtype, const F& f) {
  if (dtype == kFloat32) {
    f(float{});
  } else if (dtype == kFloat16) {
    f(__half{});
  } else {
    f(__nv_bfloat16{});
  }
}

}  // namespace cuda
}  // namespace cachedit
