#include "checks.h"

#include <initializer_list>

namespace cachedit {
namespace {

std::string item(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

std::string shape(const Tensor& tensor) { return shape_string(tensor.sizes, tensor.dim); }

[[noreturn]] void refuse(const char* op, const std::string& message) { fail(std::string(op) + ": " + message); }

void check_length(const char* op, const char* name, size_t size, const Named& first) {
  if (size != first.tensors.size()) {
    refuse(op, std::string(name) + " must have as many tensors as " + first.name + ", " +
                   std::to_string(first.tensors.size()) + ", got " + std::to_string(size));
  }
}

void check_device(const char* op, const std::string& what, const Tensor& tensor, const std::string& first,
                  const Tensor& like) {
  if (!tensor.same_device(like)) {
    refuse(op, what + " must be on the device of " + first + ", " + device_string(like) + ", got " +
                   device_string(tensor));
  }
}

template <class What>  // the name is put together only for a message
void check_device(const char* op, const What& what, const Tensor& tensor, const Named& first) {
  const Tensor& like = first.tensors[0];
  if (!tensor.same_device(like)) check_device(op, what(), tensor, item(first.name, 0), like);
}

bool is_float8(const Tensor& tensor) { return tensor.dtype == aoti_torch_dtype_float8_e4m3fn(); }

void check_float8(const char* op, size_t i, const Tensor& r) {
  if (!is_float8(r)) refuse(op, item("ring", i) + " must be float8_e4m3fn, got " + dtype_string(r.dtype));
}

void check_dtype(const char* op, const char* name, size_t i, const Tensor& tensor, const Named& first) {
  if (tensor.dtype != first.tensors[i].dtype) {
    refuse(op, item(name, i) + " must have the dtype of " + item(first.name, i) + ", " +
                   dtype_string(first.tensors[i].dtype) + ", got " + dtype_string(tensor.dtype));
  }
}

std::pair<const char*, const char*> extent(const Tensor& tensor) {
  const char* start = static_cast<const char*>(tensor.data());
  if (tensor.numel == 0) return {start, start};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim; ++d) last += (tensor.sizes[d] - 1) * tensor.strides[d];
  return {start, start + (last + 1) * tensor.element_size()};
}

}  // namespace

void check_streams(const char* op, std::initializer_list<Named> lists) {
  const Named& first = *lists.begin();
  if (first.tensors.empty()) refuse(op, std::string(first.name) + " must have at least one tensor, got an empty list");
  for (const Named& list : lists) check_length(op, list.name, list.tensors.size(), first);
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    const Tensor& like = first.tensors[i];
    if (kernel_dtype(like.dtype) == kDTypes) {
      refuse(op, item(first.name, i) + " must be float32, float16 or bfloat16, got " + dtype_string(like.dtype));
    }
    for (const Named& list : lists) {
      const Tensor& tensor = list.tensors[i];
      check_device(op, [&] { return item(list.name, i); }, tensor, first);
      check_dtype(op, list.name, i, tensor, first);
      if (!tensor.same_shape(like)) {
        refuse(op, item(list.name, i) + " must have the shape of " + item(first.name, i) + ", " + shape(like) +
                       ", got " + shape(tensor));
      }
    }
  }
}

void check_batch(const char* op, const Named& first) {
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    const Tensor& tensor = first.tensors[i];
    if (tensor.dim == 0) {
      refuse(op, item(first.name, i) + " must have a batch dimension for per_sample, got shape ()");
    }
    if (tensor.sizes[0] != first.tensors[0].sizes[0]) {
      refuse(op, item(first.name, i) + " must have the batch size of " + item(first.name, 0) + ", " +
                     std::to_string(first.tensors[0].sizes[0]) + ", got " + std::to_string(tensor.sizes[0]));
    }
  }
}

void check_ring(const char* op, const Named& first, const Tensors& ring, bool float8) {
  check_length(op, "ring", ring.size(), first);
  for (size_t i = 0; i < ring.size(); ++i) {
    const Tensor& like = first.tensors[i];
    const Tensor& r = ring[i];
    check_device(op, [&] { return item("ring", i); }, r, first);
    if (float8) {
      check_float8(op, i, r);
    } else {
      check_dtype(op, "ring", i, r, first);
    }
    if (r.dim != like.dim + 1 || !std::equal(like.sizes, like.sizes + like.dim, r.sizes + 1)) {
      refuse(op, item("ring", i) + " must have the shape of " + item(first.name, i) + ", " + shape(like) +
                     ", behind its slots, got " + shape(r));
    }
    if (r.sizes[0] != ring[0].sizes[0]) {
      refuse(op, item("ring", i) + " must have as many slots as ring[0], " + std::to_string(ring[0].sizes[0]) +
                     ", got " + std::to_string(r.sizes[0]));
    }
  }
}

void check_writable(const char* op, const Named& ring) {
  for (size_t i = 0; i < ring.tensors.size(); ++i) {
    const Tensor& r = ring.tensors[i];
    if (r.numel == 0) continue;
    int64_t packed = 1;
    for (int64_t d = r.dim - 1; d > 0; --d) {
      if (r.sizes[d] != 1 && r.strides[d] != packed) {
        refuse(op, item(ring.name, i) + " must be contiguous within each slot, got strides " +
                       shape_string(r.strides, r.dim));
      }
      packed *= r.sizes[d];
    }
    if (r.sizes[0] > 1 && r.strides[0] < packed) {
      refuse(op, item(ring.name, i) + " must have slots that do not overlap, got strides " +
                     shape_string(r.strides, r.dim));
    }
  }
}

void check_scales(const char* op, const Tensors& ring, const Tensors& scales) {
  check_length(op, "scales", scales.size(), {"ring", ring});
  for (size_t i = 0; i < ring.size(); ++i) {
    const Tensor& r = ring[i];
    const Tensor& s = scales[i];
    check_device(op, [&] { return item("scales", i); }, s, {"ring", ring});
    if (s.dtype != float32_dtype()) refuse(op, item("scales", i) + " must be float32, got " + dtype_string(s.dtype));
    if (r.dim < 2) {
      refuse(op, item("ring", i) + " must have rows to scale, a dimension behind its slots, got shape " + shape(r));
    }
    if (s.dim != r.dim - 1 || !std::equal(s.sizes, s.sizes + s.dim, r.sizes)) {
      refuse(op, item("scales", i) + " must have the shape of " + item("ring", i) + " without its last dimension, " +
                     shape_string(r.sizes, r.dim - 1) + ", got " + shape(s));
    }
  }
  check_writable(op, {"ring", ring});
  check_writable(op, {"scales", scales});
}

void check_slot(const char* op, const Tensor& slot, const Named& first) {
  if (slot.numel != 1 || !is_integer(slot.dtype)) {
    refuse(op, "slot must be one integer, got " + dtype_string(slot.dtype) + " of shape " + shape(slot));
  }
  check_device(op, [] { return std::string("slot"); }, slot, first);
}

void check_slot(const char* op, int64_t slot, const Tensors& ring) {
  if (slot < 0 || slot >= ring[0].sizes[0]) {
    refuse(op, "slot must be in [0, " + std::to_string(ring[0].sizes[0]) + "), got " + std::to_string(slot));
  }
}

void check_weights(const char* op, size_t count, const Tensors& ring) {
  if (static_cast<int64_t>(count) != ring[0].sizes[0]) {
    refuse(op, "weights must have one value per ring slot, " + std::to_string(ring[0].sizes[0]) + ", got " +
                   std::to_string(count));
  }
}

void check_weights(const char* op, const Tensor& weights, const Named& hidden, const Tensors& ring) {
  const std::string slots = std::to_string(ring[0].sizes[0]);
  if (weights.dtype != float32_dtype()) refuse(op, "weights must be float32, got " + dtype_string(weights.dtype));
  check_device(op, [] { return std::string("weights"); }, weights, hidden);
  if ((weights.dim != 1 && weights.dim != 2) || weights.sizes[weights.dim - 1] != ring[0].sizes[0]) {
    refuse(op, "weights must have the shape (" + slots + ",) or (batch, " + slots + "), got " + shape(weights));
  }
  if (weights.dim == 1) return;
  for (size_t i = 0; i < hidden.tensors.size(); ++i) {
    const Tensor& h = hidden.tensors[i];
    if (h.dim == 0 || h.sizes[0] != weights.sizes[0]) {
      refuse(op, item("hidden", i) + " must have the batch size of weights, " + std::to_string(weights.sizes[0]) +
                     ", in dimension 0, got shape " + shape(h));
    }
  }
}

void check_float8(const char* op, const Tensors& ring) {
  if (ring.empty()) refuse(op, "ring must have at least one tensor, got an empty list");
  for (size_t i = 0; i < ring.size(); ++i) {
    check_device(op, [&] { return item("ring", i); }, ring[i], {"ring", ring});
    check_float8(op, i, ring[i]);
  }
}

void check_gram_ring(const char* op, const Tensors& ring, bool per_sample) {
  for (size_t i = 0; i < ring.size(); ++i) {
    const Tensor& r = ring[i];
    if (r.dim < (per_sample ? 2 : 1)) {
      refuse(op, item("ring", i) + " must have " +
                     (per_sample ? "a slot and a batch dimension for per_sample" : "a slot dimension") +
                     ", got shape " + shape(r));
    }
    if (r.sizes[0] != ring[0].sizes[0]) {
      refuse(op, item("ring", i) + " must have as many slots as ring[0], " + std::to_string(ring[0].sizes[0]) +
                     ", got " + std::to_string(r.sizes[0]));
    }
    if (per_sample && r.sizes[1] != ring[0].sizes[1]) {
      refuse(op, item("ring", i) + " must have the batch size of ring[0], " + std::to_string(ring[0].sizes[1]) +
                     ", got " + std::to_string(r.sizes[1]));
    }
  }
}

void check_gram_slots(const char* op, const Tensors& ring, const std::vector<int64_t>& slots) {
  const int64_t count = ring[0].sizes[0];
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0 || slots[i] >= count) {
      refuse(op, item("slots", i) + " must be in [0, " + std::to_string(count) + "), got " + std::to_string(slots[i]));
    }
  }
  if (slots.size() > kMaxGramSlots) {
    refuse(op, "at most " + std::to_string(kMaxGramSlots) + " slots can be multiplied at once, got " +
                   std::to_string(slots.size()));
  }
}

void check_attention(const char* op, const std::string& name, const Tensor& tensor) {
  if (kernel_dtype(tensor.dtype) == kDTypes) {
    refuse(op, name + " must be float32, float16 or bfloat16, got " + dtype_string(tensor.dtype));
  }
  if (tensor.dim != 4) {
    refuse(op, name + " must have the shape (batch, length, heads, head_dim), got " + shape(tensor));
  }
}

void check_merge(const char* op, const Tensor& out, const Tensor& lse, const Tensor& out2, const Tensor& lse2) {
  check_attention(op, "out", out);
  check_device(op, "out2", out2, "out", out);
  const bool wide = out.dtype == float32_dtype();
  if (wide ? kernel_dtype(out2.dtype) == kDTypes : out2.dtype != out.dtype) {
    refuse(op, "out2 must be " + (wide ? "float32, float16 or bfloat16" : dtype_string(out.dtype) + ", as out is") +
                   ", got " + dtype_string(out2.dtype));
  }
  if (!out2.same_shape(out)) refuse(op, "out2 must have the shape of out, " + shape(out) + ", got " + shape(out2));
  for (const auto& [name, tensor] : {std::pair("lse", &lse), std::pair("lse2", &lse2)}) {
    check_device(op, name, *tensor, "out", out);
    if (tensor->dtype != float32_dtype()) {
      refuse(op, std::string(name) + " must be float32, got " + dtype_string(tensor->dtype));
    }
    if (tensor->dim != 3 || !std::equal(out.sizes, out.sizes + 3, tensor->sizes)) {
      refuse(op, std::string(name) + " must have the shape " + shape_string(out.sizes, 3) + ", got " + shape(*tensor));
    }
  }
}

void check_splits(const char* op, const char* name, int64_t dim, const std::vector<int64_t>& splits,
                  const int64_t* sizes) {
  if (dim != 1 && dim != 2) {
    refuse(op, std::string(name) + " must be 1 (sequence) or 2 (heads), got " + std::to_string(dim));
  }
  int64_t sum = 0;
  bool negative = false;
  for (int64_t size : splits) {
    sum += size;
    negative = negative || size < 0;
  }
  if (negative || sum != sizes[dim]) {
    refuse(op, "splits must be sizes that add up to " + std::to_string(sizes[dim]) + ", dimension " +
                   std::to_string(dim) + ", got " + shape_string(splits.data(), splits.size()));
  }
}

void check_pack(const char* op, const Tensors& tensors, const std::vector<int64_t>& splits, int64_t dim,
                size_t float8) {
  if (tensors.empty()) refuse(op, "tensors must have at least one tensor, got an empty list");
  const Tensor& like = tensors[0];
  const Named all{"tensors", tensors};
  check_attention(op, "tensors[0]", like);
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(op, [&] { return item("tensors", i); }, tensors[i], all);
    if (tensors[i].dtype != like.dtype) {
      refuse(op, item("tensors", i) + " must have the dtype of tensors[0], " + dtype_string(like.dtype) + ", got " +
                     dtype_string(tensors[i].dtype));
    }
    if (!tensors[i].same_shape(like)) {
      refuse(op, item("tensors", i) + " must have the shape of tensors[0], " + shape(like) + ", got " +
                     shape(tensors[i]));
    }
  }
  if (float8 != tensors.size()) {
    refuse(op, "float8 must have one value per tensor, " + std::to_string(tensors.size()) + ", got " +
                   std::to_string(float8));
  }
  check_splits(op, "scatter_dim", dim, splits, like.sizes);
}

void check_buffer(const char* op, const Tensor& buffer, const std::vector<int64_t>& shape_,
                  const std::vector<int64_t>& splits, int64_t dim, int32_t dtype) {
  if (buffer.dtype != aoti_torch_dtype_uint8() || buffer.dim != 1 || (buffer.numel > 1 && buffer.strides[0] != 1)) {
    refuse(op, "buffer must be contiguous uint8 of one dimension, got " + dtype_string(buffer.dtype) + " of shape " +
                   shape(buffer) + " and strides " + shape_string(buffer.strides, buffer.dim));
  }
  if (kernel_dtype(dtype) == kDTypes) {
    refuse(op, "dtype must be float32, float16 or bfloat16, got " + dtype_string(dtype));
  }
  if (shape_.size() != 4 || *std::min_element(shape_.begin(), shape_.end()) < 0) {
    refuse(op, "shape must be (batch, length, heads, head_dim), got " + shape_string(shape_.data(), shape_.size()));
  }
  check_splits(op, "gather_dim", dim, splits, shape_.data());
}

void check_buffer_bytes(const char* op, const Tensor& buffer, int64_t bytes) {
  if (buffer.numel != bytes) {
    refuse(op, "buffer must have " + std::to_string(bytes) + " bytes, got " + std::to_string(buffer.numel));
  }
}

void check_aliases(const char* op, std::initializer_list<Named> inputs, std::initializer_list<Named> written) {
  for (const Named& target : written) {
    for (size_t i = 0; i < target.tensors.size(); ++i) {
      const auto [start, stop] = extent(target.tensors[i]);
      // Returns whether it came upon the tensor itself: those before it have been compared then.
      auto check = [&, start = start, stop = stop](const Named& list) {
        for (size_t j = 0; j < list.tensors.size(); ++j) {
          if (&list.tensors[j] == &target.tensors[i]) return true;
          const auto [low, high] = extent(list.tensors[j]);
          if (low < stop && start < high) {
            refuse(op, item(target.name, i) + " must not share memory with " + item(list.name, j));
          }
        }
        return false;
      };
      for (const Named& list : inputs) check(list);
      for (const Named& list : written) {
        if (check(list)) break;
      }
    }
  }
}

}  // namespace cachedit
