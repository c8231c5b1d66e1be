// What the .cu files use of CUDA, on the CPU: threads of a block are fibers that take turns at barriers, blocks run one
// after the other. Slow, exact about who waits for whom within a block, and blind to memory ordering between blocks.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };

namespace host {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned index = 0;
  bool done = false;
  static constexpr size_t kStack = 64 * 1024;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Thread> threads;
  Thread* running = nullptr;
  std::function<void()> body;
  Barrier block, warps[32];
  uint64_t exchanged[1024];
  unsigned launches = 0;

  unsigned live(unsigned first, unsigned end) const {
    unsigned count = 0;
    for (unsigned i = first; i < std::min<size_t>(end, threads.size()); ++i) count += !threads[i].done;
    return count;
  }

  void wait(Barrier& barrier, unsigned first, unsigned end) {
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    while (barrier.generation == generation) {
      if (barrier.arrived >= live(first, end)) {
        barrier.arrived = 0;
        ++barrier.generation;
      } else {
        swapcontext(&running->context, &scheduler);
      }
    }
  }
  void wait_for_warp() {
    const unsigned warp = running->index / 32;
    wait(warps[warp], warp * 32, warp * 32 + 32);
  }

  void run_block() {
    block = {};
    std::fill(std::begin(warps), std::end(warps), Barrier{});
    for (Thread& thread : threads) {
      thread.index = static_cast<unsigned>(&thread - threads.data());
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = Thread::kStack;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, enter, 0);
    }
    while (live(0, ~0u) > 0) {
      for (Thread& thread : threads) {
        if (thread.done) continue;
        running = &thread;
        swapcontext(&scheduler, &thread.context);
      }
    }
  }
  static void enter();
};

inline Machine machine;
inline dim3 block_index, grid_size, block_size;

inline void Machine::enter() {
  machine.body();
  machine.running->done = true;
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return machine.running->index; }
  } x;
};

}  // namespace host

inline host::ThreadIndex threadIdx;
inline dim3 &blockIdx = host::block_index, &gridDim = host::grid_size, &blockDim = host::block_size;

inline void __syncthreads() { host::machine.wait(host::machine.block, 0, ~0u); }
inline void __threadfence() {}

inline float exchange(float x, unsigned source) {
  auto& machine = host::machine;
  std::memcpy(&machine.exchanged[machine.running->index], &x, sizeof x);
  machine.wait_for_warp();
  float y;
  std::memcpy(&y, &machine.exchanged[source], sizeof y);
  machine.wait_for_warp();
  return y;
}
inline float __shfl_down_sync(unsigned, float x, int distance) {
  const unsigned i = threadIdx.x;
  return exchange(x, i % 32 + distance < 32 ? i + distance : i);
}
inline float __shfl_xor_sync(unsigned, float x, int mask) { return exchange(x, threadIdx.x ^ mask); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline unsigned atomicInc(unsigned* address, unsigned end) {
  const unsigned old = *address;
  *address = old >= end ? 0 : old + 1;
  return old;
}
inline float __ldcg(const float* address) { return *address; }

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

// Every other launch runs its blocks in the opposite order: results must not depend on it.
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  auto& machine = host::machine;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (machine.threads.size() != blockDim.x) machine.threads = std::vector<host::Thread>(blockDim.x);
  machine.body = [&] { kernel(params); };
  const bool backwards = machine.launches++ % 2 == 1;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx.x = backwards ? gridDim.x - 1 - i : i;
    machine.run_block();
  }
  return cudaSuccess;
}
