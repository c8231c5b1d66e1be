// A thin, owning view of what arrives through torch's stable ABI: lists of tensors with the metadata that checks and
// kernels need, fetched once. Written on the C interface itself: torch::stable::Tensor allocates for every tensor, and
// at a few microseconds a call that shows.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace cachedit {

[[noreturn]] void fail(const std::string& message);  // RuntimeError in Python

// For calls of the C interface; torch has logged the cause where there is one.
inline void require(AOTITorchError code, const char* call) {
  if (code != TORCH_SUCCESS) fail(std::string("cachedit: ") + call + " failed");
}
#define CACHEDIT_TORCH(call) ::cachedit::require((call), #call)

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle);  // takes ownership
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor();

  // Shape (borrowed from the tensor), dtype and device, in torch's numbers.
  int64_t dim = 0;
  int64_t numel = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;  // of a GPU

  const void* data() const;
  void* mutable_data() const;
  int element_size() const { return static_cast<int>(aoti_torch_dtype_element_size(dtype)); }
  bool same_shape(const Tensor& other) const;
  bool same_device(const Tensor& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  // Contiguous, on CPU or on the device of `like`.
  static Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Tensor* like = nullptr);
  void copy_from(const Tensor& other);

 private:
  AtenTensorHandle handle_ = nullptr;
};

using Tensors = std::vector<Tensor>;

// Take over what the dispatcher put on the stack.
Tensor take_tensor(StableIValue tensor);
Tensors take_tensors(StableIValue list);
std::vector<float> take_floats(StableIValue list);  // rounded from double

StableIValue give(Tensor tensor);
StableIValue give(Tensors tensors);

// The kernels' name for torch's dtype, kDTypes where it is none of theirs; and the number of float32 itself.
DType kernel_dtype(int32_t dtype);
int32_t float32_dtype();

// The value of a one-element integer tensor on CPU.
bool is_integer(int32_t dtype);
int64_t integer_value(const Tensor& tensor);

// As Python would print them: "(2, 8, 64)", "bfloat16", "cpu".
std::string shape_string(const int64_t* values, int64_t count);
std::string dtype_string(int32_t dtype);
std::string device_string(const Tensor& tensor);

}  // namespace cachedit
