#include "cpu/launch.h"
#include "cpu/parallel.h"

namespace cachedit {
namespace {

// f(stream, row) for all rows; every row is computed alone, so threads change nothing.
template <class Stream, class F>
void for_rows(const std::vector<Stream>& streams, const F& f) {
  for (const Stream& stream : streams) {
    parallel(stream.rows, stream.rows * stream.columns, [&](int64_t row, int64_t end) {
      for (; row < end; ++row) f(stream, row);
    });
  }
}

// Room for `rows` rows of that many columns, and the bytes from one to the next.
std::pair<char*, int64_t> scratch_rows(int64_t rows, int64_t columns) {
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  return {scratch(rows * chunks), chunks * kScratch};
}

}  // namespace

void residual_push_float8(const std::vector<PushFloat8Stream>& streams) {
  const ResidualKernels& table = *kernels().residual;
  for_rows(streams, [&](const PushFloat8Stream& stream, int64_t row) {
    const int64_t n = stream.columns, begin = row * n;
    const auto [room, bytes] = scratch_rows(2, n);
    const void* before = stream.before.read(begin, n, room);
    const void* after = stream.after.read(begin, n, room + bytes);
    stream.scales[row] = table.residual_push_float8[stream.dtype](before, after, n, stream.codes + begin);
  });
}

void residual_forecast_float8(const std::vector<ForecastFloat8Stream>& streams, const float* weights, int64_t samples,
                              float base) {
  const ForecastKernels& table = *kernels().forecast;
  for_rows(streams, [&](const ForecastFloat8Stream& stream, int64_t row) {
    const int64_t n = stream.columns, begin = row * n;
    const int64_t slots = static_cast<int64_t>(stream.slots.size());
    const float* row_weights = weights + row / (stream.rows / samples) * slots;
    // By the slots in use: their codes, and the factors that weight and scale make together.
    thread_local std::vector<const void*> codes;
    thread_local std::vector<float> factors;
    codes.clear();
    factors.clear();
    for (int64_t k = 0; k < slots; ++k) {
      if (row_weights[k] == 0) continue;  // not read: it may never have been written
      codes.push_back(stream.slots[k].codes + begin);
      factors.push_back(row_weights[k] * stream.slots[k].scales[row]);
    }
    const void* hidden = base != 0 ? stream.hidden.read(begin, n, scratch_rows(1, n).first) : nullptr;
    table.residual_forecast_float8[stream.dtype](hidden, base, codes.data(), factors.data(),
                                                 static_cast<int64_t>(factors.size()), n, stream.out.at(begin));
  });
}

}  // namespace cachedit
