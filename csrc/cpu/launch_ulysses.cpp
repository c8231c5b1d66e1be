#include <cstring>

#include "cpu/launch.h"
#include "cpu/parallel.h"

namespace cachedit {
namespace {

// f(block, row within the block, head, heads): the runs of heads that a token has in the blocks. A run's rows (a token
// and head) are neighbours in the tensor and in the block alike.
template <class F>
void for_runs(const UlyssesLayout& layout, int64_t token, const F& f) {
  if (layout.dim == 2) {
    for (const auto& block : layout.blocks) {
      if (block.size > 0) f(block, token * block.size, block.start, block.size);
    }
    return;
  }
  const int64_t l = token % layout.length, b = token / layout.length;
  for (const auto& block : layout.blocks) {
    if (l >= block.start && l < block.start + block.size) {
      f(block, (b * block.size + l - block.start) * layout.heads, 0, layout.heads);
    }
  }
}

// f(tensor, token) for all of them.
template <class F>
void for_tokens(const UlyssesLayout& layout, const F& f) {
  const int64_t tokens = layout.batch * layout.length;
  const int64_t count = tokens * static_cast<int64_t>(layout.float8.size());
  parallel(count, count * layout.heads * layout.head_dim, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) f(i / tokens, i % tokens);
  });
}

void fill_sections(const UlyssesLayout& layout, char* buffer) {
  auto fill = [&](int64_t offset, int64_t bytes) {
    if (aligned(bytes) != bytes) std::memset(buffer + offset + bytes, 0, aligned(bytes) - bytes);
  };
  for (const auto& block : layout.blocks) {
    for (size_t t = 0; t < layout.float8.size(); ++t) {
      fill(layout.values(block, t), layout.value_bytes(block, t));
      if (layout.float8[t]) fill(layout.scales(block, t), layout.scale_bytes(block));
    }
  }
}

}  // namespace

void ulysses_pack(const UlyssesLayout& layout, DType dtype, const std::vector<Elements>& tensors, char* buffer) {
  const Quantize quantize = kernels().ulysses->quantize[dtype];
  const int64_t head_dim = layout.head_dim, row_bytes = head_dim * layout.element_size;
  const int64_t per_token = layout.heads * head_dim;
  fill_sections(layout, buffer);
  for_tokens(layout, [&](int64_t t, int64_t token) {
    const char* x = static_cast<const char*>(
        tensors[t].read(token * per_token, per_token, scratch((per_token + kChunk - 1) / kChunk)));
    for_runs(layout, token, [&](const UlyssesLayout::Block& block, int64_t row, int64_t head, int64_t heads) {
      char* values = buffer + layout.values(block, t);
      if (layout.float8[t]) {
        float* scales = reinterpret_cast<float*>(buffer + layout.scales(block, t));
        quantize(x + head * row_bytes, heads, head_dim, reinterpret_cast<uint8_t*>(values) + row * head_dim,
                 scales + row);
      } else {
        std::memcpy(values + row * row_bytes, x + head * row_bytes, heads * row_bytes);
      }
    });
  });
}

void ulysses_unpack(const UlyssesLayout& layout, DType dtype, const char* buffer,
                    const std::vector<Unpacked>& tensors) {
  const Dequantize dequantize = kernels().ulysses->dequantize[dtype];
  const int64_t head_dim = layout.head_dim, row_bytes = head_dim * layout.element_size;
  for_tokens(layout, [&](int64_t t, int64_t token) {
    const Unpacked& tensor = tensors[t];
    for_runs(layout, token, [&](const UlyssesLayout::Block& block, int64_t row, int64_t head, int64_t heads) {
      const char* values = buffer + layout.values(block, t);
      const int64_t target = token * layout.heads + head;  // row of the tensor
      if (!layout.float8[t]) {
        std::memcpy(tensor.values + target * row_bytes, values + row * row_bytes, heads * row_bytes);
        return;
      }
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(values) + row * head_dim;
      const float* scales = reinterpret_cast<const float*>(buffer + layout.scales(block, t)) + row;
      if (tensor.scales == nullptr) {
        dequantize(codes, scales, heads, head_dim, tensor.values + target * row_bytes);
      } else {
        std::memcpy(tensor.values + target * head_dim, codes, heads * head_dim);
        std::memcpy(tensor.scales + target, scales, heads * sizeof(float));
      }
    });
  });
}

}  // namespace cachedit
