// How the launchers cut work up, and the room that they give to threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cachedit {

constexpr int64_t kChunk = 16384;       // elements; a multiple of the kernels' blocks
constexpr int64_t kGrain = 4 * kChunk;  // what is worth a thread, about 10 microseconds
constexpr int64_t kScratch = kChunk * sizeof(float);

// f(begin, end) over ranges of [0, count), which have `elements` in all; on threads where that is worth it.
template <class F>
void parallel(int64_t count, int64_t elements, const F& f) {
  if (elements <= kGrain) {
    f(int64_t{0}, count);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain * count / elements);
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  torch_parallel_for(0, count, grain, call, const_cast<F*>(&f));
}

// Room for `chunks` chunks of tensors that can't be used in place, one of it per thread, made when first needed.
inline char* scratch(int64_t chunks) {
  thread_local std::vector<char> room;
  if (static_cast<int64_t>(room.size()) < chunks * kScratch) room.resize(chunks * kScratch);
  return room.data();
}

}  // namespace cachedit
