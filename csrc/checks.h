// What the operators refuse, and in which words: the twin of cachedit_kernels/_checks.py.
#pragma once

#include "stable.h"

namespace cachedit {

struct Named {
  const char* name;
  const Tensors& tensors;
};

// Every list as long as the first; every tensor of a stream alike; all on one device.
void check_streams(const char* op, std::initializer_list<Named> lists);

// Every stream with a batch dimension, all of one size.
void check_batch(const char* op, const Named& first);

// Per stream [K, *shape] of its dtype, or in E4M3; K equal everywhere.
void check_ring(const char* op, const Named& first, const Tensors& ring, bool float8 = false);

// For writing: slots contiguous and apart.
void check_writable(const char* op, const Named& ring);

// For rings in E4M3 with a scale per row, the last dimension; slots of both contiguous and apart.
void check_scales(const char* op, const Tensors& ring, const Tensors& scales);

void check_slot(const char* op, const Tensor& slot, const Named& first);  // all but its value
void check_slot(const char* op, int64_t slot, const Tensors& ring);

void check_weights(const char* op, size_t count, const Tensors& ring);
void check_weights(const char* op, const Tensor& weights, const Named& hidden, const Tensors& ring);

// For ring_gram_float8, in place of check_streams.
void check_float8(const char* op, const Tensors& ring);

// For ring_gram: slots (and samples) alike in every stream; those asked for exist and are not too many.
void check_gram_ring(const char* op, const Tensors& ring, bool per_sample);
void check_gram_slots(const char* op, const Tensors& ring, const std::vector<int64_t>& slots);

// For merge_attention: out [B, L, H, D], out2 like it but perhaps narrower, lse and lse2 [B, L, H].
void check_merge(const char* op, const Tensor& out, const Tensor& lse, const Tensor& out2, const Tensor& lse2);

// For ulysses_pack and ulysses_unpack; float8 has a value per tensor.
void check_pack(const char* op, const Tensors& tensors, const std::vector<int64_t>& splits, int64_t dim, size_t float8);
void check_buffer(const char* op, const Tensor& buffer, const std::vector<int64_t>& shape,
                  const std::vector<int64_t>& splits, int64_t dim, int32_t dtype);
void check_buffer_bytes(const char* op, const Tensor& buffer, int64_t bytes);

// No memory that is written is another's.
void check_aliases(const char* op, std::initializer_list<Named> inputs, std::initializer_list<Named> written);

}  // namespace cachedit
