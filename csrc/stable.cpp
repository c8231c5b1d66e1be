#include "stable.h"

#include <algorithm>
#include <stdexcept>

namespace cachedit {
namespace {

class List {  // owns the list, not what is in it
 public:
  explicit List(StableListHandle handle) : handle_(handle) {}
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  ~List() { torch_delete_list(handle_); }

  size_t size() const {
    size_t size = 0;
    CACHEDIT_TORCH(torch_list_size(handle_, &size));
    return size;
  }

  template <class T>
  T get(size_t i) const {
    StableIValue value;
    CACHEDIT_TORCH(torch_list_get_item(handle_, i, &value));
    return torch::stable::detail::to<T>(value);
  }

 private:
  StableListHandle handle_;
};

}  // namespace

void fail(const std::string& message) { throw std::runtime_error(message); }

Tensor::Tensor(AtenTensorHandle handle) : handle_(handle) {
  int64_t* borrowed = nullptr;
  CACHEDIT_TORCH(aoti_torch_get_dim(handle_, &dim));
  CACHEDIT_TORCH(aoti_torch_get_numel(handle_, &numel));
  CACHEDIT_TORCH(aoti_torch_get_sizes(handle_, &borrowed));
  sizes = borrowed;
  CACHEDIT_TORCH(aoti_torch_get_strides(handle_, &borrowed));
  strides = borrowed;
  CACHEDIT_TORCH(aoti_torch_get_dtype(handle_, &dtype));
  CACHEDIT_TORCH(aoti_torch_get_device_type(handle_, &device_type));
  if (device_type == aoti_torch_device_type_cuda()) CACHEDIT_TORCH(aoti_torch_get_device_index(handle_, &device_index));
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  dim = other.dim;
  numel = other.numel;
  sizes = other.sizes;
  strides = other.strides;
  dtype = other.dtype;
  device_type = other.device_type;
  device_index = other.device_index;
  return *this;
}

Tensor::~Tensor() {
  if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
}

const void* Tensor::data() const {
  const void* data = nullptr;
  CACHEDIT_TORCH(torch_get_const_data_ptr(handle_, &data));
  return data;
}

void* Tensor::mutable_data() const {
  void* data = nullptr;
  CACHEDIT_TORCH(torch_get_mutable_data_ptr(handle_, &data));
  return data;
}

bool Tensor::same_shape(const Tensor& other) const {
  return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
}

Tensor Tensor::empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Tensor* like) {
  constexpr int64_t kInline = 8;
  int64_t few[kInline];
  std::vector<int64_t> many(dim > kInline ? dim : 0);
  int64_t* strides = dim > kInline ? many.data() : few;
  int64_t packed = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = packed;
    packed *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  const int32_t device = like == nullptr ? aoti_torch_device_type_cpu() : like->device_type;
  const int32_t index = like == nullptr ? 0 : like->device_index;
  CACHEDIT_TORCH(aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, &handle));
  return Tensor(handle);
}

void Tensor::copy_from(const Tensor& other) { CACHEDIT_TORCH(aoti_torch_copy_(handle_, other.handle_, 0)); }

Tensor take_tensor(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }

Tensors take_tensors(StableIValue value) {
  List list(torch::stable::detail::to<StableListHandle>(value));
  const size_t size = list.size();
  Tensors tensors;
  tensors.reserve(size);
  for (size_t i = 0; i < size; ++i) tensors.emplace_back(list.get<AtenTensorHandle>(i));
  return tensors;
}

std::vector<float> take_floats(StableIValue value) {
  List list(torch::stable::detail::to<StableListHandle>(value));
  std::vector<float> floats(list.size());
  for (size_t i = 0; i < floats.size(); ++i) floats[i] = static_cast<float>(list.get<double>(i));
  return floats;
}

StableIValue give(Tensor tensor) { return torch::stable::detail::from(tensor.release()); }

StableIValue give(Tensors tensors) {
  StableListHandle list = nullptr;
  CACHEDIT_TORCH(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) CACHEDIT_TORCH(torch_list_push_back(list, give(std::move(tensor))));
  return torch::stable::detail::from(list);
}

DType kernel_dtype(int32_t dtype) {
  static const int32_t numbers[kDTypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(),
                                           aoti_torch_dtype_bfloat16()};
  return static_cast<DType>(std::find(numbers, numbers + kDTypes, dtype) - numbers);
}

int32_t float32_dtype() {
  static const int32_t number = aoti_torch_dtype_float32();
  return number;
}

bool is_integer(int32_t dtype) {
  return dtype == aoti_torch_dtype_int64() || dtype == aoti_torch_dtype_int32() || dtype == aoti_torch_dtype_int16() ||
         dtype == aoti_torch_dtype_int8() || dtype == aoti_torch_dtype_uint8();
}

int64_t integer_value(const Tensor& tensor) {
  const void* data = tensor.data();
  if (tensor.dtype == aoti_torch_dtype_int64()) return *static_cast<const int64_t*>(data);
  if (tensor.dtype == aoti_torch_dtype_int32()) return *static_cast<const int32_t*>(data);
  if (tensor.dtype == aoti_torch_dtype_int16()) return *static_cast<const int16_t*>(data);
  if (tensor.dtype == aoti_torch_dtype_int8()) return *static_cast<const int8_t*>(data);
  return *static_cast<const uint8_t*>(data);
}

std::string shape_string(const int64_t* values, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + (count == 1 ? ",)" : ")");
}

std::string dtype_string(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},   {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_int64(), "int64"},         {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
  };
  for (const auto& [number, name] : names) {
    if (number == dtype) return name;
  }
  return "dtype " + std::to_string(dtype);
}

std::string device_string(const Tensor& tensor) {
  if (tensor.device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (tensor.device_type == aoti_torch_device_type_meta()) return "meta";
  if (tensor.device_type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(tensor.device_index);
  return "device type " + std::to_string(tensor.device_type);
}

}  // namespace cachedit
