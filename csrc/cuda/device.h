// torch's side of a launch: the current stream, and memory that outlives calls.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "cuda/kernels.h"
#include "stable.h"

namespace cachedit {
namespace cuda {

// Makes the tensor's device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  void* stream() const { return stream_; }  // torch's current one

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// Refuses in words what a launch function reports.
void check_launch(const char* op, const char* error);

// What sums are made in: for launches on this device and its current stream.
struct Workspace {
  unsigned* tickets;  // zeros
  float* partials;
};

// `held` takes what must live until the call's launches have been made.
Workspace workspace(const char* op, const Tensor& like, const OnDevice& device, int64_t tickets, int64_t partials,
                    Tensors* held);

}  // namespace cuda
}  // namespace cachedit
