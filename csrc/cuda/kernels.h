// The CUDA kernels' plain C interface: raw pointers, sizes and a stream, no headers of torch or CUDA. Everything is
// launched on the current device and checked by the caller. Functions return null, or what CUDA says went wrong.
//
// A launch takes up to kMaxStreams tensors, which may differ in shape and dtype; empty ones are left out.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace cachedit {
namespace cuda {

constexpr int kMaxStreams = 4;
constexpr int kMaxWeights = 64;  // that travel as arguments of a launch

// Rows of adjacent elements; strides between rows are in elements.
struct Rows {
  void* data;
  int64_t stride;
};

struct SumsStream {
  DType dtype;
  int64_t rows;     // of each group
  int64_t columns;  // elements of a row
  Rows inputs[3];   // before, after, anchor; or previous, current
};

// sums[s][g] = (sum |difference|, sum |scale|) over the rows of group g of stream s.
struct Sums {
  int streams;
  SumsStream stream[kMaxStreams];
  int64_t groups;     // of each stream
  float* partials;    // room for cachedit_cuda_partials(streams, groups) pairs
  unsigned* tickets;  // streams * groups zeros; zeros again when the kernel is done
  float* sums;        // [streams, groups, 2]
};

struct PushStream {
  DType dtype;
  int64_t rows;
  int64_t columns;
  Rows before, after;
  Rows slot0;            // of the ring
  int64_t slot_stride;   // between slots, in elements
};

// ring[slot] = after - before, rounded once. A slot outside [0, slots) writes nothing.
struct Push {
  int streams;
  PushStream stream[kMaxStreams];
  int64_t slots;
  int64_t slot;
  const void* device_slot;  // an integer on the device, which stands in for `slot` unless it is null
  int device_slot_bytes;    // 1, 2, 4 or 8
  bool device_slot_signed;
};

struct ForecastStream {
  DType dtype;
  int64_t rows;
  int64_t columns;
  Rows hidden;
  Rows slot0;
  int64_t slot_stride;
  void* out;  // contiguous
};

// out = base * hidden + sum_k weights[k] * ring[k], terms added in the order of k, rounded once. What would be
// multiplied by zero is not read.
struct Forecast {
  int streams;
  ForecastStream stream[kMaxStreams];
  float base;
  int64_t slots;
  float weights[kMaxWeights];
  const float* device_weights;   // on the device, stand in for `weights` unless null
  int64_t weights_row_stride;    // 0 where all rows have the same
  int64_t weights_slot_stride;
};

// A tensor [B, L, H(, D)] whose last dimension's elements are neighbours; strides in elements.
struct Attention {
  void* data;
  int64_t strides[3];
};

// merged = w * out + w2 * out2 with w : w2 = exp(lse) : exp(lse2), and merged_lse = log(exp(lse) + exp(lse2)). What would
// be multiplied by zero is not read.
struct Merge {
  DType dtype;   // of out and merged
  DType dtype2;  // of out2; the same, or dtype is float32
  int64_t batch, length, heads, head_dim;
  Attention out, lse, out2, lse2;
  void* merged;       // contiguous
  float* merged_lse;  // contiguous
};

constexpr int kMaxPeers = 64;
constexpr int kMaxTensors = 4;

// What goes to, or comes from, one peer: see cpu/ulysses_layout.h.
struct Peer {
  int64_t start;  // along the dimension that is cut
  int64_t size;
  int64_t rows;   // tokens and heads
  int64_t offset;  // in bytes from the buffer's start, a multiple of 16
};

struct Exchanged {
  Attention tensor;  // source of packing, contiguous target of unpacking
  float* scales;     // of unpacking, [B, L, H]: not null where the tensor stays quantised
  bool float8;
  int index;  // among the tensors that travel like it
};

// Tensors [batch, length, heads, head_dim] of one shape, cut along dimension 1 (sequence) or 2 (heads), and a buffer of
// a block per peer. A launch takes up to kMaxTensors of the call's tensors and kMaxPeers of its peers.
struct Exchange {
  DType dtype;
  int64_t batch, length, heads, head_dim;
  int dim;
  int tensors;
  Exchanged tensor[kMaxTensors];
  int quantised, plain;  // how many there are in the whole call
  int peers;
  Peer peer[kMaxPeers];
  char* buffer;  // aligned to 16 bytes
};

}  // namespace cuda
}  // namespace cachedit

extern "C" {
int cachedit_cuda_runtime_version();  // of the CUDA runtime within, as 13000 for 13.0
int64_t cachedit_cuda_partials(int streams, int64_t groups);
const char* cachedit_cuda_residual_l1(const cachedit::cuda::Sums* sums, void* stream);
const char* cachedit_cuda_l1(const cachedit::cuda::Sums* sums, void* stream);
const char* cachedit_cuda_residual_push(const cachedit::cuda::Push* push, void* stream);
const char* cachedit_cuda_residual_forecast(const cachedit::cuda::Forecast* forecast, void* stream);
const char* cachedit_cuda_merge_attention(const cachedit::cuda::Merge* merge, void* stream);
const char* cachedit_cuda_ulysses_pack(const cachedit::cuda::Exchange* exchange, void* stream);
const char* cachedit_cuda_ulysses_unpack(const cachedit::cuda::Exchange* exchange, void* stream);

// For the tickets: whether the stream is being captured, and zeros written in its order.
const char* cachedit_cuda_is_capturing(void* stream, bool* capturing);
const char* cachedit_cuda_clear(void* data, int64_t bytes, void* stream);
}
