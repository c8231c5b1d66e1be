#include <cmath>
#include <limits>

#include "cpu/launch.h"
#include "cpu/parallel.h"

namespace cachedit {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();  // the lse of attention over no keys

struct Weights {
  float first, second;
  float lse;
};

// The reference's formula, step by step.
Weights weights(float lse, float lse2) {
  const bool first = lse >= lse2;
  const float top = first ? lse : lse2;
  const float decay = lse == kEmpty && lse2 == kEmpty ? 0.0f : std::exp(-std::abs(lse - lse2));
  const float larger = 1.0f / (1.0f + decay), smaller = decay / (1.0f + decay);
  return {lse == kEmpty ? 0.0f : first ? larger : smaller, lse2 == kEmpty ? 0.0f : first ? smaller : larger,
          top + std::log1p(decay)};
}

}  // namespace

void merge_attention(const Merge& merge) {
  const int64_t head_dim = merge.head_dim;
  const bool mixed = merge.dtype != merge.dtype2;  // a float32 result beside another: the latter is widened
  const ResidualForecast blend = kernels().forecast->residual_forecast[merge.dtype];
  const Widen widen = kernels().attention->widen[merge.dtype2];
  const int64_t at_once = std::max<int64_t>(1, kChunk / std::max<int64_t>(head_dim, 1));  // rows
  const int64_t chunks = (at_once * std::max<int64_t>(head_dim, 1) + kChunk - 1) / kChunk;  // that many rows fill
  parallel((merge.rows + at_once - 1) / at_once, merge.rows * head_dim, [&](int64_t block, int64_t end) {
    for (; block < end; ++block) {
      char* room = scratch(3 * chunks + 2);
      const int64_t row = block * at_once;
      const int64_t rows = std::min(at_once, merge.rows - row), n = rows * head_dim;
      const char* out = static_cast<const char*>(merge.out.read(row * head_dim, n, room));
      const char* out2 = static_cast<const char*>(merge.out2.read(row * head_dim, n, room + chunks * kScratch));
      if (mixed) {
        float* wide = reinterpret_cast<float*>(room + 2 * chunks * kScratch);
        widen(out2, n, wide);
        out2 = reinterpret_cast<const char*>(wide);
      }
      room += 3 * chunks * kScratch;
      const float* lse = static_cast<const float*>(merge.lse.read(row, rows, room));
      const float* lse2 = static_cast<const float*>(merge.lse2.read(row, rows, room + kScratch));
      const int64_t row_bytes = head_dim * merge.merged.element_size;
      for (int64_t i = 0; i < rows; ++i, out += row_bytes, out2 += row_bytes) {
        const Weights w = weights(lse[i], lse2[i]);
        const void* slots[] = {out2};
        blend(w.first != 0 ? out : nullptr, w.first, slots, &w.second, w.second != 0, head_dim,
              merge.merged.at((row + i) * head_dim));
        merge.merged_lse[row + i] = w.lse;
      }
    }
  });
}

}  // namespace cachedit
