// Where everything lies in the buffers that Ulysses exchanges: the twin of cachedit_kernels/ulysses/layout.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cachedit {

constexpr int64_t kAlignment = 16;  // bytes

inline int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Tensors [batch, length, heads, head_dim] of one shape, cut along dimension 1 (sequence) or 2 (heads).
class UlyssesLayout {
 public:
  struct Block {  // what goes to, or comes from, one peer
    int64_t start;  // along the dimension that is cut
    int64_t size;
    int64_t rows;  // tokens and heads
    int64_t offset;
  };

  UlyssesLayout(const std::vector<int64_t>& shape, const std::vector<int64_t>& splits, int64_t dim,
                int64_t element_size, const std::vector<bool>& float8)
      : batch(shape[0]), length(shape[1]), heads(shape[2]), head_dim(shape[3]), dim(dim), element_size(element_size),
        float8(float8) {
    for (bool quantised : float8) {
      index_.push_back(quantised ? quantised_++ : plain_++);
    }
    int64_t start = 0;
    for (int64_t size : splits) {
      const int64_t rows = dim == 1 ? batch * size * heads : batch * length * size;
      blocks.push_back({start, size, rows, bytes});
      start += size;
      bytes += quantised_ * (aligned(rows * head_dim) + aligned(rows * kScaleBytes)) +
               plain_ * aligned(rows * head_dim * element_size);
    }
  }

  // Where tensor t's codes or elements and its scales begin in the buffer, and the bytes they take without filling.
  int64_t values(const Block& block, size_t t) const {
    const int64_t codes = aligned(block.rows * head_dim);
    return block.offset +
           (float8[t] ? index_[t] * codes : quantised_ * codes + index_[t] * aligned(value_bytes(block, t)));
  }
  int64_t value_bytes(const Block& block, size_t t) const {
    return block.rows * head_dim * (float8[t] ? 1 : element_size);
  }
  int64_t scales(const Block& block, size_t t) const {
    const int64_t codes = aligned(block.rows * head_dim), elements = aligned(block.rows * head_dim * element_size);
    return block.offset + quantised_ * codes + plain_ * elements + index_[t] * aligned(scale_bytes(block));
  }
  int64_t scale_bytes(const Block& block) const { return block.rows * kScaleBytes; }

  int64_t batch, length, heads, head_dim;
  int64_t dim;
  int64_t element_size;
  std::vector<bool> float8;
  std::vector<Block> blocks;
  int64_t bytes = 0;

 private:
  static constexpr int64_t kScaleBytes = 4;

  std::vector<int64_t> index_;  // of each tensor among those that travel like it
  int64_t quantised_ = 0, plain_ = 0;
};

}  // namespace cachedit
