// residual_forecast.
#include <cstring>

#include "cuda/launch.cuh"

namespace cachedit {
namespace cuda {
namespace {

struct ForecastParams {
  Forecast call;
  int64_t tiles[kMaxStreams];
  int64_t all_tiles;
};

// A vector that waits: as words, since elements of 16 bits would take a register each.
struct alignas(16) Words {
  uint32_t at[4];
};

// kWhole: all of the tile is there, and aligned.
template <class T, bool kWhole>
__device__ void forecast_tile(const Forecast& call, const ForecastStream& stream, const Tile<T>& tile, bool wide) {
  using V = Vector<T>;
  const T* hidden = static_cast<const T*>(stream.hidden.data) + tile.row * stream.hidden.stride;
  const T* ring = static_cast<const T*>(stream.slot0.data) + tile.row * stream.slot0.stride;
  T* out = static_cast<T*>(stream.out) + tile.row * stream.columns;
  const float* weights = call.device_weights == nullptr ? nullptr : call.device_weights + tile.row * call.weights_row_stride;

  // The terms: -1 is the hidden states, k is slot k. Those with weight zero are passed over, by all threads of the block
  // alike, as a tile lies within a row.
  int64_t term = -1;
  float weight = call.base;
  const auto skip_zeros = [&] {
    while (weight == 0.0f && ++term < call.slots) {
      weight = weights == nullptr ? call.weights[term] : weights[term * call.weights_slot_stride];
    }
  };
  const auto source = [&] { return term < 0 ? hidden : ring + term * stream.slot_stride; };
  float total[kVectors][V::kSize];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) total[v][i] = weight == 0.0f ? 0.0f : -0.0f;  // -0 + x is x, whatever its sign
  }
  skip_zeros();
  if constexpr (kWhole) {
    Words now[kVectors] = {}, next[kVectors] = {};
    const auto fetch = [&](Words* words) {
      if (term >= call.slots) return;
      const T* const from = source();
#pragma unroll
      for (int v = 0; v < kVectors; ++v) words[v] = *reinterpret_cast<const Words*>(from + tile.column(v));
    };
    fetch(now);
    while (term < call.slots) {
      const float times = weight;
      weight = 0.0f;
      skip_zeros();
      fetch(next);  // on its way while the one before is added
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        V x;
        memcpy(&x, &now[v], sizeof x);
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) total[v][i] += times * widen(x.at[i]);
        now[v] = next[v];
      }
    }
  } else {
    for (; term < call.slots; weight = 0.0f, skip_zeros()) {
      const T* const from = source();
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const V x = load<V>(from + tile.column(v), stream.columns - tile.column(v), wide);
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) total[v][i] += weight * widen(x.at[i]);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    V x;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) x.at[i] = narrow<T>(total[v][i]);
    store(out + tile.column(v), x, kWhole ? V::kSize : stream.columns - tile.column(v), kWhole || wide);
  }
}

template <class T>
__device__ void forecast_tile(const Forecast& call, const ForecastStream& stream, int64_t index) {
  const Tile<T> tile = Tile<T>::number(index, stream.rows, stream.columns);
  const bool wide = is_wide<T>(stream.hidden.data, stream.hidden.stride) &&
                    is_wide<T>(stream.slot0.data, stream.slot0.stride) && is_wide<T>(stream.slot0.data, stream.slot_stride) &&
                    is_wide<T>(stream.out, stream.rows > 1 ? stream.columns : 0);
  if (wide && tile.start + Tile<T>::kColumns <= stream.columns) {
    forecast_tile<T, true>(call, stream, tile, wide);
  } else {
    forecast_tile<T, false>(call, stream, tile, wide);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forecast_kernel(const __grid_constant__ ForecastParams params) {
  for (int64_t index = blockIdx.x; index < params.all_tiles; index += gridDim.x) {
    int s = 0;
    int64_t tile = index;
    while (tile >= params.tiles[s]) tile -= params.tiles[s++];
    const ForecastStream& stream = params.call.stream[s];
    with_type(stream.dtype, [&](auto type) { forecast_tile<decltype(type)>(params.call, stream, tile); });
  }
}

}  // namespace
}  // namespace cuda
}  // namespace cachedit

using namespace cachedit::cuda;

const char* cachedit_cuda_residual_forecast(const Forecast* forecast, void* stream) {
  ForecastParams params{};
  params.call = *forecast;
  for (int s = 0; s < forecast->streams; ++s) {
    const ForecastStream& each = forecast->stream[s];
    params.tiles[s] = each.rows * ceil_div(each.columns, tile_columns(each.dtype));
    params.all_tiles += params.tiles[s];
  }
  return launch_over(params.all_tiles, forecast_kernel, params, stream);
}
