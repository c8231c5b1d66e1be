// ulysses_pack and ulysses_unpack. A row is a token and head; neighbouring threads of a warp share one.
#include <cuda_fp8.h>

#include <cfloat>

#include "cuda/launch.cuh"

namespace cachedit {
namespace cuda {
namespace {

constexpr int kCount = 16;  // elements that a thread moves at once: their codes are one 16-byte access

struct ExchangeParams {
  Exchange call;
  int lane_bits;  // 2^lane_bits threads share a row
  unsigned first_tile[kMaxPeers + 1];  // of each peer's, within a tensor's; the last entry is their number
};

__host__ __device__ inline int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Where a tensor's codes or elements, and its scales, lie in a peer's block; as cpu/ulysses_layout.h has it.
struct Sections {
  int64_t values, value_bytes;
  int64_t scales, scale_bytes;

  __device__ Sections(const Exchange& call, const Exchanged& tensor, const Peer& peer, int64_t element_size) {
    const int64_t numel = peer.rows * call.head_dim;
    const int64_t plain = peer.offset + call.quantised * aligned(numel);
    value_bytes = tensor.float8 ? numel : numel * element_size;
    values = (tensor.float8 ? peer.offset : plain) + tensor.index * aligned(value_bytes);
    scale_bytes = peer.rows * 4;
    scales = plain + call.plain * aligned(numel * element_size) + tensor.index * aligned(scale_bytes);
  }
};

// The threads' rows within a peer's block. All threads of a warp stay, as shuffles need them.
struct Row {
  bool inside;
  int64_t in_block;
  int64_t b, l, h;  // in the whole tensor
  int lane;

  __device__ Row(const ExchangeParams& params, const Peer& peer, int64_t tile) {
    const Exchange& call = params.call;
    lane = threadIdx.x & ((1 << params.lane_bits) - 1);
    in_block = tile * (kThreads >> params.lane_bits) + (threadIdx.x >> params.lane_bits);
    inside = in_block < peer.rows;
    // 32 bits suffice, which the launch has made sure of, and are divided in a fraction of the time.
    const unsigned length = static_cast<unsigned>(call.dim == 1 ? peer.size : call.length);
    const unsigned heads = static_cast<unsigned>(call.dim == 2 ? peer.size : call.heads);
    const unsigned row = inside ? static_cast<unsigned>(in_block) : 0;
    h = row % heads + (call.dim == 2 ? peer.start : 0);
    l = row / heads % length + (call.dim == 1 ? peer.start : 0);
    b = row / heads / length;
  }
};

__device__ uint8_t to_e4m3(float x) {
  if (x != x) return static_cast<uint8_t>(__float_as_uint(x) >> 24 | 0x7f);  // keeps its sign, as on CPU
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

__device__ float from_e4m3(uint8_t code) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))); }

// Zeros from a section's end to the next one's start.
__device__ void fill(char* buffer, int64_t offset, int64_t bytes) {
  if (bytes + static_cast<int64_t>(threadIdx.x) < aligned(bytes)) buffer[offset + bytes + threadIdx.x] = 0;
}

template <class T>
__device__ bool is_wide(const Attention& tensor, int64_t columns) {
  const int64_t strides = tensor.strides[0] | tensor.strides[1] | tensor.strides[2];
  return columns % kCount == 0 &&
         (reinterpret_cast<uintptr_t>(tensor.data) | static_cast<uintptr_t>(strides * int64_t{sizeof(T)})) % 16 == 0;
}

template <class T>
__device__ void pack_tile(const ExchangeParams& params, const Exchanged& tensor, const Peer& peer, int64_t tile) {
  const Exchange& call = params.call;
  const Sections at(call, tensor, peer, sizeof(T));
  if (tile == 0) {
    fill(call.buffer, at.values, at.value_bytes);
    if (tensor.float8) fill(call.buffer, at.scales, at.scale_bytes);
  }
  using V = Vector<T, kCount>;
  using Codes = Vector<uint8_t, kCount>;
  const Row row(params, peer, tile);
  const int64_t* strides = tensor.tensor.strides;
  const T* const source =
      static_cast<const T*>(tensor.tensor.data) + row.b * strides[0] + row.l * strides[1] + row.h * strides[2];
  const int64_t columns = row.inside ? call.head_dim : 0, step = kCount << params.lane_bits;
  const int64_t first = row.lane * kCount;
  const bool wide = is_wide<T>(tensor.tensor, call.head_dim);
  if (!tensor.float8) {
    T* const target = reinterpret_cast<T*>(call.buffer + at.values) + row.in_block * call.head_dim;
    for (int64_t c = first; c < columns; c += step) {
      store(target + c, load<V>(source + c, columns - c, wide), columns - c, wide);
    }
    return;
  }
  V x = load<V>(source + first, columns - first, wide);  // all of the row, where it is short
  float amax = 0.0f;
  for (int64_t c = first; c < columns; c += step) {
    if (c != first) x = load<V>(source + c, columns - c, wide);
#pragma unroll
    for (int i = 0; i < kCount; ++i) amax = fmaxf(amax, fabsf(widen(x.at[i])));  // passes over NaN
  }
  for (int mask = (1 << params.lane_bits) / 2; mask > 0; mask /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, mask));
  const float scale = fmaxf(amax / 448.0f, FLT_MIN);  // rows of zeros divide like others
  if (row.inside && row.lane == 0) reinterpret_cast<float*>(call.buffer + at.scales)[row.in_block] = scale;
  uint8_t* const target = reinterpret_cast<uint8_t*>(call.buffer + at.values) + row.in_block * call.head_dim;
  for (int64_t c = first; c < columns; c += step) {
    if (columns > step) x = load<V>(source + c, columns - c, wide);
    Codes codes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) codes.at[i] = to_e4m3(widen(x.at[i]) / scale);
    store(target + c, codes, columns - c, wide);
  }
}

template <class T>
__device__ void unpack_tile(const ExchangeParams& params, const Exchanged& tensor, const Peer& peer, int64_t tile) {
  const Exchange& call = params.call;
  const Sections at(call, tensor, peer, sizeof(T));
  using V = Vector<T, kCount>;
  using Codes = Vector<uint8_t, kCount>;
  const Row row(params, peer, tile);
  const int64_t columns = row.inside ? call.head_dim : 0, step = kCount << params.lane_bits;
  const int64_t row_out = (row.b * call.length + row.l) * call.heads + row.h;
  const bool wide = call.head_dim % kCount == 0;  // sections and new tensors are aligned
  T* const target = static_cast<T*>(tensor.tensor.data) + row_out * call.head_dim;
  if (!tensor.float8) {
    const T* const source = reinterpret_cast<const T*>(call.buffer + at.values) + row.in_block * call.head_dim;
    for (int64_t c = row.lane * kCount; c < columns; c += step) {
      store(target + c, load<V>(source + c, columns - c, wide), columns - c, wide);
    }
    return;
  }
  const uint8_t* const source = reinterpret_cast<const uint8_t*>(call.buffer + at.values) + row.in_block * call.head_dim;
  const float scale = row.inside ? reinterpret_cast<const float*>(call.buffer + at.scales)[row.in_block] : 0.0f;
  if (tensor.scales != nullptr) {
    uint8_t* const codes = static_cast<uint8_t*>(tensor.tensor.data) + row_out * call.head_dim;
    if (row.inside && row.lane == 0) tensor.scales[row_out] = scale;
    for (int64_t c = row.lane * kCount; c < columns; c += step) {
      store(codes + c, load<Codes>(source + c, columns - c, wide), columns - c, wide);
    }
    return;
  }
  for (int64_t c = row.lane * kCount; c < columns; c += step) {
    const Codes codes = load<Codes>(source + c, columns - c, wide);
    V x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.at[i] = narrow<T>(from_e4m3(codes.at[i]) * scale);
    store(target + c, x, columns - c, wide);
  }
}

template <bool kPack>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    exchange_kernel(const __grid_constant__ ExchangeParams params) {
  const Exchange& call = params.call;
  const unsigned tiles = params.first_tile[call.peers];  // of each tensor
  for (unsigned index = blockIdx.x; index < call.tensors * tiles; index += gridDim.x) {
    const Exchanged& tensor = call.tensor[index / tiles];
    const unsigned in_tensor = index % tiles;
    int p = 0;
    while (in_tensor >= params.first_tile[p + 1]) ++p;
    const int64_t tile = in_tensor - params.first_tile[p];
    with_type(call.dtype, [&](auto type) {
      if constexpr (kPack) {
        pack_tile<decltype(type)>(params, tensor, call.peer[p], tile);
      } else {
        unpack_tile<decltype(type)>(params, tensor, call.peer[p], tile);
      }
    });
  }
}

template <bool kPack>
const char* launch_exchange(const Exchange& call, void* stream) {
  ExchangeParams params{};
  params.call = call;
  while (params.lane_bits < 5 && (kCount << params.lane_bits) < call.head_dim) ++params.lane_bits;
  int64_t tiles = 0;
  for (int p = 0; p < call.peers; ++p) {
    tiles += ceil_div(call.peer[p].rows, kThreads >> params.lane_bits);
    if (call.peer[p].rows > INT32_MAX || call.tensors * tiles > INT32_MAX) return "2^31 tokens and heads are too many";
    params.first_tile[p + 1] = static_cast<unsigned>(tiles);
  }
  return launch_over(call.tensors * tiles, exchange_kernel<kPack>, params, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace cachedit

using namespace cachedit::cuda;

const char* cachedit_cuda_ulysses_pack(const Exchange* exchange, void* stream) {
  return launch_exchange<true>(*exchange, stream);
}

const char* cachedit_cuda_ulysses_unpack(const Exchange* exchange, void* stream) {
  return launch_exchange<false>(*exchange, stream);
}
