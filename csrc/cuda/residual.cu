// residual_l1, l1 and residual_push.
//
// A sum is made in two stages within one kernel: each block adds up its share of a group (a stream, or one sample of it)
// into a partial, and whichever block of the group finishes last, told by an integer ticket, adds the partials in the
// order of their index. No float is ever added atomically, so equal inputs give equal bits.
#include "cuda/launch.cuh"

namespace cachedit {
namespace cuda {
namespace {

struct SumsParams {
  Sums call;
  int64_t first_block[kMaxStreams];  // of each stream's
  int blocks[kMaxStreams];           // that share a group
};

struct Pair {
  float difference, scale;
};

__device__ inline Pair operator+(Pair a, Pair b) { return {a.difference + b.difference, a.scale + b.scale}; }

// In thread 0, the sum over the block, added up in a fixed order.
__device__ Pair add_block(Pair x) {
  __shared__ Pair warps[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) {
    const Pair other{__shfl_down_sync(~0u, x.difference, distance), __shfl_down_sync(~0u, x.scale, distance)};
    x = x + other;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) x = x + warps[warp];
  }
  __syncthreads();  // before the next call writes
  return x;
}

struct ResidualTerms {  // inputs: before, after, anchor
  static constexpr int kInputs = 3;
  __device__ static Pair of(const float* x) { return {fabsf((x[1] - x[0]) - x[2]), fabsf(x[2])}; }
};

struct PlainTerms {  // inputs: previous, current
  static constexpr int kInputs = 2;
  __device__ static Pair of(const float* x) { return {fabsf(x[0] - x[1]), fabsf(x[0])}; }
};

constexpr int kSumsBlocks = 3;  // per multiprocessor: with four, registers are spilled
constexpr int kSums = 4;  // that a thread keeps: its elements take turns

template <class Terms, class T>
__device__ inline void add_vectors(const Vector<T>* x, Pair* sums) {
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kSize; ++lane) {
    float terms[Terms::kInputs];
#pragma unroll
    for (int i = 0; i < Terms::kInputs; ++i) terms[i] = widen(x[i].at[lane]);
    sums[lane % kSums] = sums[lane % kSums] + Terms::of(terms);
  }
}

// The same sums get the same elements, so that sums do not depend on alignment.
template <class Terms, class T>
__device__ inline void add_vector_in_part(const T* const* rows, int64_t column, int64_t columns, bool wide,
                                          Pair* sums) {
  if (wide && column + Vector<T>::kSize <= columns) {
    Vector<T> x[Terms::kInputs];
#pragma unroll
    for (int i = 0; i < Terms::kInputs; ++i) x[i] = *reinterpret_cast<const Vector<T>*>(rows[i] + column);
    add_vectors<Terms, T>(x, sums);
    return;
  }
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kSize; ++lane) {
    if (column + lane >= columns) break;
    float terms[Terms::kInputs];
#pragma unroll
    for (int i = 0; i < Terms::kInputs; ++i) terms[i] = widen(rows[i][column + lane]);
    sums[lane % kSums] = sums[lane % kSums] + Terms::of(terms);
  }
}

// This thread's share of a group's tiles position, position + blocks, ...
template <class Terms, class T>
__device__ Pair add_tiles(const SumsStream& stream, int64_t group, int64_t position, int64_t blocks) {
  using V = Vector<T>;
  bool wide = true;
  for (int i = 0; i < Terms::kInputs; ++i) wide = wide && is_wide<T>(stream.inputs[i].data, stream.inputs[i].stride);
  Pair sums[kSums] = {};
  const int64_t tiles = stream.rows * ceil_div(stream.columns, Tile<T>::kColumns);
  for (int64_t index = position; index < tiles; index += blocks) {
    const Tile<T> tile = Tile<T>::number(index, stream.rows, stream.columns);
    const T* rows[Terms::kInputs];
#pragma unroll
    for (int i = 0; i < Terms::kInputs; ++i) {
      const int64_t row = group * stream.rows + tile.row;
      rows[i] = static_cast<const T*>(stream.inputs[i].data) + row * stream.inputs[i].stride;
    }
    if (wide && tile.start + Tile<T>::kColumns <= stream.columns) {
      V x[kVectors][Terms::kInputs];  // all in flight together
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < Terms::kInputs; ++i) x[v][i] = *reinterpret_cast<const V*>(rows[i] + tile.column(v));
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) add_vectors<Terms, T>(x[v], sums);
    } else {
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v) add_vector_in_part<Terms, T>(rows, tile.column(v), stream.columns, wide, sums);
    }
  }
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2) {
#pragma unroll
    for (int lane = 0; lane < half; ++lane) sums[lane] = sums[lane] + sums[lane + half];
  }
  return sums[0];
}

template <class Terms>
__global__ void __launch_bounds__(kThreads, kSumsBlocks)
    sums_kernel(const __grid_constant__ SumsParams params) {
  const Sums& call = params.call;
  int s = 0;
  while (s + 1 < call.streams && blockIdx.x >= params.first_block[s + 1]) ++s;
  const SumsStream& stream = call.stream[s];
  const int64_t block = blockIdx.x - params.first_block[s];
  const int64_t group = block / params.blocks[s], position = block % params.blocks[s];

  Pair sum{};
  with_type(stream.dtype, [&](auto type) {
    sum = add_tiles<Terms, decltype(type)>(stream, group, position, params.blocks[s]);
  });
  sum = add_block(sum);

  Pair* const partials = reinterpret_cast<Pair*>(call.partials) + (blockIdx.x - position);  // of the group
  const int64_t output = s * call.groups + group;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partials[position] = sum;
    __threadfence();  // the partial is there before the ticket is
    const unsigned end = static_cast<unsigned>(params.blocks[s]) - 1;
    last = atomicInc(call.tickets + output, end) == end;  // wraps: zero again for the next launch
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  Pair total{};
  for (int64_t i = threadIdx.x; i < params.blocks[s]; i += kThreads) {
    // From L2, where the other blocks' partials are; L1 may hold older lines.
    total = total + Pair{__ldcg(&partials[i].difference), __ldcg(&partials[i].scale)};
  }
  total = add_block(total);
  if (threadIdx.x == 0) reinterpret_cast<Pair*>(call.sums)[output] = total;
}

// Blocks go to streams by their size. This depends on shapes and the device alone, as equal inputs must be added up in
// equal order.
template <class Terms>
const char* launch_sums(const Sums& call, void* cuda_stream) {
  int64_t resident = 0;
  if (cudaError_t error = resident_blocks(kSumsBlocks, &resident)) return message(error);
  int64_t tiles[kMaxStreams], all = 0;
  for (int s = 0; s < call.streams; ++s) {
    tiles[s] = call.stream[s].rows * ceil_div(call.stream[s].columns, tile_columns(call.stream[s].dtype));
    all += tiles[s] * call.groups;
  }
  SumsParams params{};
  params.call = call;
  int64_t blocks = 0;
  for (int s = 0; s < call.streams; ++s) {
    const int64_t share = all == 0 ? 0 : resident * tiles[s] / all;
    params.first_block[s] = blocks;
    params.blocks[s] = static_cast<int>(std::max<int64_t>(1, std::min(tiles[s], share)));
    blocks += call.groups * params.blocks[s];
  }
  return blocks == 0 ? nullptr : launch(sums_kernel<Terms>, blocks, params, cuda_stream);
}

struct PushParams {
  Push call;
  int64_t tiles[kMaxStreams];
  int64_t all_tiles;
};

__device__ int64_t chosen_slot(const Push& call) {
  if (call.device_slot == nullptr) return call.slot;
  if (call.device_slot_bytes == 8) return *static_cast<const int64_t*>(call.device_slot);
  if (call.device_slot_bytes == 4) return *static_cast<const int32_t*>(call.device_slot);
  if (call.device_slot_bytes == 2) return *static_cast<const int16_t*>(call.device_slot);
  if (call.device_slot_signed) return *static_cast<const int8_t*>(call.device_slot);
  return *static_cast<const uint8_t*>(call.device_slot);
}

template <class T>
__device__ void push_tile(const PushStream& stream, int64_t slot, int64_t index) {
  using V = Vector<T>;
  const Tile<T> tile = Tile<T>::number(index, stream.rows, stream.columns);
  const T* before = static_cast<const T*>(stream.before.data) + tile.row * stream.before.stride;
  const T* after = static_cast<const T*>(stream.after.data) + tile.row * stream.after.stride;
  T* const first = static_cast<T*>(stream.slot0.data) + slot * stream.slot_stride;
  T* out = first + tile.row * stream.slot0.stride;
  const bool wide = is_wide<T>(stream.before.data, stream.before.stride) &&
                    is_wide<T>(stream.after.data, stream.after.stride) && is_wide<T>(first, stream.slot0.stride);
  V x[kVectors], y[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v] = load<V>(before + tile.column(v), stream.columns - tile.column(v), wide);
    y[v] = load<V>(after + tile.column(v), stream.columns - tile.column(v), wide);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) x[v].at[i] = narrow<T>(widen(y[v].at[i]) - widen(x[v].at[i]));
    store(out + tile.column(v), x[v], stream.columns - tile.column(v), wide);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    push_kernel(const __grid_constant__ PushParams params) {
  const int64_t slot = chosen_slot(params.call);
  if (slot < 0 || slot >= params.call.slots) return;
  for (int64_t index = blockIdx.x; index < params.all_tiles; index += gridDim.x) {
    int s = 0;
    int64_t tile = index;
    while (tile >= params.tiles[s]) tile -= params.tiles[s++];
    const PushStream& stream = params.call.stream[s];
    with_type(stream.dtype, [&](auto type) { push_tile<decltype(type)>(stream, slot, tile); });
  }
}

}  // namespace
}  // namespace cuda
}  // namespace cachedit

using namespace cachedit::cuda;

__attribute__((visibility("default"))) int cachedit_cuda_runtime_version() { return CUDART_VERSION; }

int64_t cachedit_cuda_partials(int streams, int64_t groups) {
  int64_t resident = 0;
  return resident_blocks(kSumsBlocks, &resident) == cudaSuccess ? resident + streams * groups : 0;
}

const char* cachedit_cuda_residual_l1(const Sums* sums, void* stream) {
  return launch_sums<ResidualTerms>(*sums, stream);
}

const char* cachedit_cuda_l1(const Sums* sums, void* stream) { return launch_sums<PlainTerms>(*sums, stream); }

const char* cachedit_cuda_residual_push(const Push* push, void* stream) {
  PushParams params{};
  params.call = *push;
  for (int s = 0; s < push->streams; ++s) {
    const PushStream& each = push->stream[s];
    params.tiles[s] = each.rows * ceil_div(each.columns, tile_columns(each.dtype));
    params.all_tiles += params.tiles[s];
  }
  return launch_over(params.all_tiles, push_kernel, params, stream);
}

const char* cachedit_cuda_is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return message(error);
}

const char* cachedit_cuda_clear(void* data, int64_t bytes, void* stream) {
  return message(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}
