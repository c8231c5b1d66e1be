#include "cuda/device.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace cachedit {
namespace cuda {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// libtorch_cuda is there only where torch is built for CUDA, so this library must not need it; whoever has CUDA tensors
// has it loaded.
CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (found == nullptr) fail("cachedit: aoti_torch_get_current_cuda_stream is not in libtorch_cuda.so");
  return reinterpret_cast<CurrentStream>(found);
}

struct Buffers {
  Tensor tickets, partials;
};

Tensor uninitialised(const Tensor& like, int64_t count) { return Tensor::empty(&count, 1, float32_dtype(), &like); }

Tensor zeros(const char* op, const Tensor& like, const OnDevice& device, int64_t count) {
  Tensor tensor = uninitialised(like, count);
  check_launch(op, cachedit_cuda_clear(tensor.mutable_data(), count * 4, device.stream()));
  return tensor;
}

Workspace workspace_of(const Buffers& buffers) {
  return {static_cast<unsigned*>(buffers.tickets.mutable_data()), static_cast<float*>(buffers.partials.mutable_data())};
}

}  // namespace

OnDevice::OnDevice(const Tensor& tensor) {
  if (tensor.device_type != aoti_torch_device_type_cuda()) return;  // the kernels compiled for the host, in tests
  static const CurrentStream current_stream = find_current_stream();
  guard_.emplace(tensor.device_index);
  CACHEDIT_TORCH(current_stream(tensor.device_index, &stream_));
}

void check_launch(const char* op, const char* error) {
  if (error == nullptr) return;
  fail(std::string(op) + ": the CUDA C++ kernel cannot be launched: " + error +
       "; CACHEDIT_KERNELS_BACKEND=triton does without it");
}

// One set of buffers per stream, as launches on one stream never overlap. A captured graph may be replayed on any stream
// beside eager launches, so it gets its own, cleared anew by every replay.
Workspace workspace(const char* op, const Tensor& like, const OnDevice& device, int64_t tickets, int64_t partials,
                    Tensors* held) {
  bool capturing = false;
  check_launch(op, cachedit_cuda_is_capturing(device.stream(), &capturing));
  if (capturing) {
    Buffers buffers{zeros(op, like, device, tickets), uninitialised(like, 2 * partials)};
    const Workspace captured = workspace_of(buffers);
    held->push_back(std::move(buffers.tickets));
    held->push_back(std::move(buffers.partials));
    return captured;
  }
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<int32_t, void*>, Buffers>;  // never freed: CUDA may be gone at exit
  const std::lock_guard<std::mutex> lock(mutex);
  Buffers& buffers = known[{like.device_index, device.stream()}];
  // What is outgrown is kept, as another thread may be about to launch with it; twofold growth bounds what that takes.
  static auto& outgrown = *new Tensors;
  if (buffers.tickets.numel < tickets) {
    outgrown.push_back(std::move(buffers.tickets));
    buffers.tickets = zeros(op, like, device, std::max<int64_t>(2 * tickets, 256));
  }
  if (buffers.partials.numel < 2 * partials) {
    outgrown.push_back(std::move(buffers.partials));
    buffers.partials = uninitialised(like, 4 * partials);
  }
  return workspace_of(buffers);
}

}  // namespace cuda
}  // namespace cachedit
