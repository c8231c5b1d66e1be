// residual_forecast.
#include "cuda/launch.cuh"

namespace cachedit {
namespace cuda {
namespace {

struct ForecastParams {
  Forecast call;
  int64_t tiles[kMaxStreams];
  int64_t all_tiles;
};

template <class T>
__device__ void forecast_tile(const Forecast& call, const ForecastStream& stream, int64_t index) {
  using V = Vector<T>;
  const Tile<T> tile = Tile<T>::number(index, stream.rows, stream.columns);
  const T* hidden = static_cast<const T*>(stream.hidden.data) + tile.row * stream.hidden.stride;
  const T* ring = static_cast<const T*>(stream.slot0.data) + tile.row * stream.slot0.stride;
  T* out = static_cast<T*>(stream.out) + tile.row * stream.columns;
  const bool wide = is_wide<T>(stream.hidden.data, stream.hidden.stride) &&
                    is_wide<T>(stream.slot0.data, stream.slot0.stride) && is_wide<T>(stream.slot0.data, stream.slot_stride) &&
                    is_wide<T>(stream.out, stream.rows > 1 ? stream.columns : 0);
  float total[kVectors][V::kSize] = {};
  if (call.base != 0.0f) {
    V x[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load<V>(hidden + tile.column(v), stream.columns - tile.column(v), wide);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) total[v][i] = call.base * widen(x[v].at[i]);
    }
  }
  const float* weights = call.device_weights == nullptr ? nullptr : call.device_weights + tile.row * call.weights_row_stride;
  for (int64_t k = 0; k < call.slots; ++k) {
    const float weight = weights == nullptr ? call.weights[k] : weights[k * call.weights_slot_stride];
    if (weight == 0.0f) continue;  // all threads of the block alike, as a tile lies within a row
    const T* slot = ring + k * stream.slot_stride;
    V x[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) x[v] = load<V>(slot + tile.column(v), stream.columns - tile.column(v), wide);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) total[v][i] += weight * widen(x[v].at[i]);
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    V x;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) x.at[i] = narrow<T>(total[v][i]);
    store(out + tile.column(v), x, stream.columns - tile.column(v), wide);
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
