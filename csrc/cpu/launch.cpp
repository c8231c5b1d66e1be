#include "cpu/launch.h"

#include <algorithm>

#include "cpu/parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cachedit {
namespace {

// The chunks of all streams, numbered through. A chunk lies within one row.
template <class Stream>
class Chunks {
 public:
  explicit Chunks(const std::vector<Stream>& streams) : streams_(streams) {
    for (const Stream& stream : streams) {
      count_ += stream.rows * per_row(stream);
      elements_ += stream.rows * stream.columns;
    }
  }

  int64_t count() const { return count_; }

  static int64_t per_row(const Stream& stream) { return (stream.columns + kChunk - 1) / kChunk; }

  // f(stream, row, first element of the chunk within the row, elements, number of the chunk)
  template <class F>
  void run(const F& f) const {
    parallel(count_, elements_, Body<F>{*this, f});
  }

 private:
  template <class F>
  struct Body {
    const Chunks& chunks;
    const F& f;

    void operator()(int64_t begin, int64_t end) const {
      int64_t first = 0;  // number of the stream's first chunk
      for (const Stream& stream : chunks.streams_) {
        const int64_t in_row = per_row(stream);
        const int64_t last = first + stream.rows * in_row;
        for (int64_t i = std::max(begin, first); i < std::min(end, last); ++i) {
          const int64_t row = (i - first) / in_row;
          const int64_t column = (i - first) % in_row * kChunk;
          f(stream, row, column, std::min(kChunk, stream.columns - column), i);
        }
        first = last;
      }
    }
  };

  const std::vector<Stream>& streams_;
  int64_t count_ = 0;
  int64_t elements_ = 0;
};

template <class F>
void two_sums(const std::vector<SumsStream>& streams, float* out, const F& kernel) {
  const Chunks<SumsStream> chunks(streams);
  constexpr int64_t kFew = 16;
  double few[2 * kFew] = {};
  std::vector<double> many(chunks.count() > kFew ? 2 * chunks.count() : 0);
  double* sums = chunks.count() > kFew ? many.data() : few;
  chunks.run([&](const SumsStream& stream, int64_t row, int64_t column, int64_t n, int64_t chunk) {
    kernel(stream, row * stream.columns + column, n, sums + 2 * chunk);
  });
  for (const SumsStream& stream : streams) {
    for (int64_t row = 0; row < stream.rows; ++row, out += 2) {
      double total[2] = {};
      for (int64_t i = 0; i < Chunks<SumsStream>::per_row(stream); ++i, sums += 2) {
        total[0] += sums[0];
        total[1] += sums[1];
      }
      out[0] = static_cast<float>(total[0]);
      out[1] = static_cast<float>(total[1]);
    }
  }
}

// Elements [begin, begin + n) of E4M3 rows, in float32.
const void* widen(const Float8Slot& slot, int64_t width, int64_t begin, int64_t n, void* out) {
  const Dequantize dequantize = kernels().ulysses->dequantize[kFloat32];
  for (int64_t i = 0; i < n;) {
    const int64_t row = (begin + i) / width;
    const int64_t run = std::min(n - i, (row + 1) * width - (begin + i));
    dequantize(slot.codes + begin + i, slot.scales + row, 1, run, static_cast<float*>(out) + i);
    i += run;
  }
  return out;
}

}  // namespace

void advise_new_memory([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{1} << 21;
  if (bytes < 4 * kHugePage) return;
  const int64_t start = (reinterpret_cast<int64_t>(data) + kHugePage - 1) & -kHugePage;
  const int64_t stop = (reinterpret_cast<int64_t>(data) + bytes) & -kHugePage;
  madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);  // advice only: a failure changes nothing
#endif
}

void residual_l1(const std::vector<SumsStream>& streams, float* out) {
  const ResidualKernels& table = *kernels().residual;
  two_sums(streams, out, [&](const SumsStream& stream, int64_t begin, int64_t n, double* sums) {
    char* room = scratch(3);
    const void* before = stream.inputs[0].read(begin, n, room);
    const void* after = stream.inputs[1].read(begin, n, room + kScratch);
    const void* anchor = stream.inputs[2].read(begin, n, room + 2 * kScratch);
    table.residual_l1[stream.dtype](before, after, anchor, n, sums);
  });
}

void l1(const std::vector<SumsStream>& streams, float* out) {
  const ResidualKernels& table = *kernels().residual;
  two_sums(streams, out, [&](const SumsStream& stream, int64_t begin, int64_t n, double* sums) {
    char* room = scratch(2);
    const void* previous = stream.inputs[0].read(begin, n, room);
    const void* current = stream.inputs[1].read(begin, n, room + kScratch);
    table.l1[stream.dtype](previous, current, n, sums);
  });
}

void residual_push(const std::vector<PushStream>& streams) {
  const ResidualKernels& table = *kernels().residual;
  Chunks<PushStream>(streams).run([&](const PushStream& stream, int64_t, int64_t begin, int64_t n, int64_t) {
    char* room = scratch(2);
    const void* before = stream.before.read(begin, n, room);
    const void* after = stream.after.read(begin, n, room + kScratch);
    table.residual_push[stream.dtype](before, after, n, stream.out.at(begin));
  });
}

void residual_forecast(const std::vector<ForecastStream>& streams, const float* weights, bool per_row, float base) {
  const ForecastKernels& table = *kernels().forecast;
  Chunks<ForecastStream>(streams).run(
      [&](const ForecastStream& stream, int64_t row, int64_t column, int64_t n, int64_t) {
        const int64_t slots = static_cast<int64_t>(stream.slots.size());
        const int64_t begin = row * stream.columns + column;
        const float* row_weights = weights + (per_row ? row * slots : 0);
        char* room = scratch(slots + 1);
        std::vector<const void*> pointers;
        std::vector<float> factors;
        pointers.reserve(slots);
        factors.reserve(slots);
        for (int64_t k = 0; k < slots; ++k) {
          if (row_weights[k] == 0) continue;  // not read: it may never have been written
          pointers.push_back(stream.slots[k].read(begin, n, room + k * kScratch));
          factors.push_back(row_weights[k]);
        }
        const void* hidden = base != 0 ? stream.hidden.read(begin, n, room + slots * kScratch) : nullptr;
        table.residual_forecast[stream.dtype](hidden, base, pointers.data(), factors.data(),
                                              static_cast<int64_t>(factors.size()), n, stream.out.at(begin));
      });
}

void ring_gram(const std::vector<GramStream>& streams, float* out) {
  const GramKernels& table = *kernels().gram;
  const Chunks<GramStream> chunks(streams);
  const int64_t slots = static_cast<int64_t>(std::max(streams[0].slots.size(), streams[0].float8_slots.size()));
  const int64_t pairs = slots * (slots + 1) / 2;
  std::vector<double> partials(chunks.count() * pairs);
  chunks.run([&](const GramStream& stream, int64_t row, int64_t column, int64_t n, int64_t chunk) {
    char* room = scratch(slots);
    const void* pointers[kMaxGramSlots];
    const int64_t begin = row * stream.columns + column;
    for (int64_t k = 0; k < slots; ++k) {
      pointers[k] = stream.width > 0 ? widen(stream.float8_slots[k], stream.width, begin, n, room + k * kScratch)
                                     : stream.slots[k].read(begin, n, room + k * kScratch);
    }
    table.ring_gram[stream.dtype](pointers, slots, n, partials.data() + chunk * pairs);
  });
  const double* partial = partials.data();
  for (const GramStream& stream : streams) {
    for (int64_t row = 0; row < stream.rows; ++row, out += slots * slots) {
      double totals[kMaxGramSlots * (kMaxGramSlots + 1) / 2] = {};
      for (int64_t i = 0; i < Chunks<GramStream>::per_row(stream); ++i, partial += pairs) {
        for (int64_t p = 0; p < pairs; ++p) totals[p] += partial[p];
      }
      const double* total = totals;
      for (int64_t i = 0; i < slots; ++i) {
        for (int64_t j = 0; j <= i; ++j, ++total) {
          out[i * slots + j] = out[j * slots + i] = static_cast<float>(*total);
        }
      }
    }
  }
}

}  // namespace cachedit
