// The kernel that decides a step on the device, and tells the conditional node behind it.
#include <cuda_runtime.h>

#include "cuda/control.h"
#include "cuda/graphs.h"
#include "cuda/policy_kernel.h"

namespace cachedit {
namespace cuda {
namespace {

constexpr int kWarp = 32;

__device__ void copy(void* to, const void* from) {
  static_assert(sizeof(Live) % sizeof(uint64_t) == 0, "copied in words of 8 bytes");
  for (unsigned i = threadIdx.x; i < sizeof(Live) / sizeof(uint64_t); i += kWarp) {
    static_cast<uint64_t*>(to)[i] = static_cast<const uint64_t*>(from)[i];
  }
  __syncwarp();
}

// One thread decides. The warp fetches what it needs at once: the thread by itself would wait for one load after another.
__global__ void __launch_bounds__(kWarp) policy_step(PolicyArguments arguments) {
  __shared__ alignas(Live) unsigned char memory[sizeof(Live)];
  Live& live = *reinterpret_cast<Live*>(memory);
  copy(&live, &arguments.control->live);
  if (threadIdx.x == 0) {
    const bool reuse =
        take_step(live, arguments.control->records, arguments.sums, arguments.slot, arguments.weights);
    if (arguments.conditional) cudaGraphSetConditional(arguments.handle, reuse ? 1 : 0);
  }
  __syncwarp();
  copy(&arguments.control->live, &live);
}

__global__ void set_step(Control* control, int64_t step) { control->live.state.step = step; }

}  // namespace

const void* policy_kernel() { return reinterpret_cast<const void*>(&policy_step); }

}  // namespace cuda
}  // namespace cachedit

const char* cachedit_cuda_control_set_step(void* device_control, int64_t step, void* stream) {
  using namespace cachedit::cuda;
  set_step<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<Control*>(device_control), step);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
