// The operators as torch calls them: takes over the arguments, checks them, hands pointers to the kernels.
// Their schemas are defined in Python (cachedit_kernels/*/op.py); this registers implementations for CPU.
#include "checks.h"
#include "cpu/launch.h"
#include "stable.h"

namespace cachedit {
namespace {

Elements elements(const Tensor& tensor) {
  return Elements(tensor.data(), tensor.element_size(), tensor.dim, tensor.sizes, tensor.strides);
}

int64_t rows(const Tensor& tensor, bool per_row) { return per_row ? tensor.sizes[0] : 1; }

int64_t columns(const Tensor& tensor, bool per_row) {
  return per_row ? tensor.numel / std::max<int64_t>(tensor.sizes[0], 1) : tensor.numel;
}

// For rings in E4M3 with a scale per row, the last dimension.
int64_t float8_rows(const Tensor& stream) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < stream.dim; ++d) rows *= stream.sizes[d];
  return rows;
}

Float8Slot float8_slot(const Tensor& ring, const Tensor& scales, int64_t k) {
  return {static_cast<const uint8_t*>(ring.data()) + k * ring.strides[0],
          static_cast<const float*>(scales.data()) + k * scales.strides[0]};
}

using RunSums = void (*)(const std::vector<SumsStream>&, float*);

Tensor sums(std::initializer_list<const Tensors*> inputs, bool per_sample, RunSums run) {
  const Tensors& first = **inputs.begin();
  std::vector<SumsStream> streams;
  streams.reserve(first.size());
  for (size_t i = 0; i < first.size(); ++i) {
    streams.push_back(
        {kernel_dtype(first[i].dtype), rows(first[i], per_sample), columns(first[i], per_sample), {}});
    streams.back().inputs.reserve(inputs.size());
    for (const Tensors* tensors : inputs) streams.back().inputs.push_back(elements((*tensors)[i]));
  }
  const int64_t count = static_cast<int64_t>(first.size());
  const int64_t whole[] = {count, 2};
  const int64_t sampled[] = {count, streams[0].rows, 2};
  Tensor out = per_sample ? Tensor::empty(sampled, 3, float32_dtype()) : Tensor::empty(whole, 2, float32_dtype());
  run(streams, static_cast<float*>(out.mutable_data()));
  return out;
}

// residual_l1(Tensor[] before, Tensor[] after, Tensor[] anchor, bool per_sample) -> Tensor
void boxed_residual_l1(StableIValue* stack, uint64_t, uint64_t) {
  const Tensors before = take_tensors(stack[0]), after = take_tensors(stack[1]), anchor = take_tensors(stack[2]);
  const bool per_sample = torch::stable::detail::to<bool>(stack[3]);
  check_streams("residual_l1", {{"before", before}, {"after", after}, {"anchor", anchor}});
  if (per_sample) check_batch("residual_l1", {"before", before});
  stack[0] = give(sums({&before, &after, &anchor}, per_sample, residual_l1));
}

// l1(Tensor[] previous, Tensor[] current, bool per_sample) -> Tensor
void boxed_l1(StableIValue* stack, uint64_t, uint64_t) {
  const Tensors previous = take_tensors(stack[0]), current = take_tensors(stack[1]);
  const bool per_sample = torch::stable::detail::to<bool>(stack[2]);
  check_streams("l1", {{"previous", previous}, {"current", current}});
  if (per_sample) check_batch("l1", {"previous", previous});
  stack[0] = give(sums({&previous, &current}, per_sample, l1));
}

// `Tensor slot` or `int slot`
template <bool kTensor>
class Slot {
 public:
  explicit Slot(StableIValue value) {
    if constexpr (kTensor) {
      tensor_ = take_tensor(value);
    } else {
      value_ = torch::stable::detail::to<int64_t>(value);
    }
  }

  int64_t checked(const char* op, const Named& first, const Tensors& ring) const {
    int64_t value = value_;
    if constexpr (kTensor) {
      check_slot(op, tensor_, first);
      value = integer_value(tensor_);
    }
    check_slot(op, value, ring);
    return value;
  }

 private:
  Tensor tensor_;
  int64_t value_ = 0;
};

// residual_push(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, Tensor slot) -> (), and with `int slot`
template <bool kTensorSlot>
void boxed_residual_push(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_push";
  const Tensors before = take_tensors(stack[0]), after = take_tensors(stack[1]), ring = take_tensors(stack[2]);
  const Slot<kTensorSlot> given(stack[3]);
  check_streams(op, {{"before", before}, {"after", after}});
  check_ring(op, {"before", before}, ring);
  check_writable(op, {"ring", ring});
  const int64_t slot = given.checked(op, {"before", before}, ring);
  check_aliases(op, {{"before", before}, {"after", after}}, {{"ring", ring}});

  std::vector<PushStream> streams;
  streams.reserve(before.size());
  for (size_t i = 0; i < before.size(); ++i) {
    const Target whole{ring[i].mutable_data(), ring[i].element_size()};
    streams.push_back({kernel_dtype(before[i].dtype), 1, before[i].numel, elements(before[i]), elements(after[i]),
                       Target{whole.at(slot * ring[i].strides[0]), whole.element_size}});
  }
  residual_push(streams);
}

// residual_push_float8(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, Tensor slot, Tensor(b!)[] scales) -> (),
// and with `int slot`
template <bool kTensorSlot>
void boxed_residual_push_float8(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_push_float8";
  const Tensors before = take_tensors(stack[0]), after = take_tensors(stack[1]), ring = take_tensors(stack[2]);
  const Slot<kTensorSlot> given(stack[3]);
  const Tensors scales = take_tensors(stack[4]);
  check_streams(op, {{"before", before}, {"after", after}});
  check_ring(op, {"before", before}, ring, true);
  check_scales(op, ring, scales);
  const int64_t slot = given.checked(op, {"before", before}, ring);
  check_aliases(op, {{"before", before}, {"after", after}}, {{"ring", ring}, {"scales", scales}});

  std::vector<PushFloat8Stream> streams;
  streams.reserve(before.size());
  for (size_t i = 0; i < before.size(); ++i) {
    const Tensor& b = before[i];
    streams.push_back({kernel_dtype(b.dtype), float8_rows(b), b.sizes[b.dim - 1], elements(b), elements(after[i]),
                       static_cast<uint8_t*>(ring[i].mutable_data()) + slot * ring[i].strides[0],
                       static_cast<float*>(scales[i].mutable_data()) + slot * scales[i].strides[0]});
  }
  residual_push_float8(streams);
}

// `Tensor weights` or `float[] weights`
template <bool kTensor>
class Weights {
 public:
  explicit Weights(StableIValue value) {
    if constexpr (kTensor) {
      tensor_ = take_tensor(value);
    } else {
      values = take_floats(value);
    }
  }

  void check(const char* op, const Named& hidden, const Tensors& ring) {
    if constexpr (kTensor) {
      check_weights(op, tensor_, hidden, ring);
      values.resize(tensor_.numel);
      const Elements read = elements(tensor_);
      for (int64_t i = 0; i < tensor_.numel; ++i) values[i] = *static_cast<const float*>(read.read(i, 1, &values[i]));
    } else {
      check_weights(op, values.size(), ring);
    }
  }

  bool per_sample() const { return kTensor && tensor_.dim == 2; }

  std::vector<float> values;

 private:
  Tensor tensor_;
};

Target new_result(const Tensor& like, Tensors& out) {
  out.push_back(Tensor::empty(like.sizes, like.dim, like.dtype));
  const Target target{out.back().mutable_data(), like.element_size()};
  advise_new_memory(target.data, like.numel * like.element_size());
  return target;
}

// residual_forecast(Tensor[] hidden, Tensor[] ring, Tensor weights, float base) -> Tensor[], and with `float[] weights`
template <bool kTensorWeights>
void boxed_residual_forecast(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_forecast";
  const Tensors hidden = take_tensors(stack[0]), ring = take_tensors(stack[1]);
  Weights<kTensorWeights> weights(stack[2]);
  const float base = static_cast<float>(torch::stable::detail::to<double>(stack[3]));
  check_streams(op, {{"hidden", hidden}});
  check_ring(op, {"hidden", hidden}, ring);
  weights.check(op, {"hidden", hidden}, ring);
  const bool per_row = weights.per_sample();

  Tensors out;
  std::vector<ForecastStream> streams;
  out.reserve(hidden.size());
  streams.reserve(hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) {
    const Tensor& h = hidden[i];
    const Tensor& r = ring[i];
    const Target target = new_result(h, out);
    std::vector<Elements> slots;
    slots.reserve(r.sizes[0]);
    const char* data = static_cast<const char*>(r.data());
    for (int64_t k = 0; k < r.sizes[0]; ++k) {
      const char* slot = data + k * r.strides[0] * r.element_size();
      slots.emplace_back(slot, r.element_size(), r.dim - 1, r.sizes + 1, r.strides + 1);
    }
    streams.push_back({kernel_dtype(h.dtype), rows(h, per_row), columns(h, per_row), elements(h), std::move(slots),
                       target});
  }
  residual_forecast(streams, weights.values.data(), per_row, base);
  stack[0] = give(std::move(out));
}

// residual_forecast_float8(Tensor[] hidden, Tensor[] ring, Tensor weights, float base, Tensor[] scales) -> Tensor[],
// and with `float[] weights`
template <bool kTensorWeights>
void boxed_residual_forecast_float8(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_forecast_float8";
  const Tensors hidden = take_tensors(stack[0]), ring = take_tensors(stack[1]);
  Weights<kTensorWeights> weights(stack[2]);
  const float base = static_cast<float>(torch::stable::detail::to<double>(stack[3]));
  const Tensors scales = take_tensors(stack[4]);
  check_streams(op, {{"hidden", hidden}});
  check_ring(op, {"hidden", hidden}, ring, true);
  check_scales(op, ring, scales);
  weights.check(op, {"hidden", hidden}, ring);

  Tensors out;
  std::vector<ForecastFloat8Stream> streams;
  out.reserve(hidden.size());
  streams.reserve(hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) {
    const Tensor& h = hidden[i];
    std::vector<Float8Slot> slots;
    slots.reserve(ring[i].sizes[0]);
    for (int64_t k = 0; k < ring[i].sizes[0]; ++k) slots.push_back(float8_slot(ring[i], scales[i], k));
    const Target target = new_result(h, out);
    streams.push_back({kernel_dtype(h.dtype), float8_rows(h), h.sizes[h.dim - 1], elements(h), std::move(slots),
                       target});
  }
  residual_forecast_float8(streams, weights.values.data(), weights.per_sample() ? hidden[0].sizes[0] : 1, base);
  stack[0] = give(std::move(out));
}

// ring_gram(Tensor[] ring, int[]? slots, bool per_sample) -> Tensor; ring_gram_float8 takes `Tensor[] scales` as well
template <bool kFloat8>
void boxed_ring_gram(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = kFloat8 ? "ring_gram_float8" : "ring_gram";
  const Tensors ring = take_tensors(stack[0]);
  const Tensors scales = kFloat8 ? take_tensors(stack[3]) : Tensors();
  const auto wanted = torch::stable::detail::to<std::optional<std::vector<int64_t>>>(stack[1]);
  const bool per_sample = torch::stable::detail::to<bool>(stack[2]);
  if (kFloat8) {
    check_float8(op, ring);
    check_scales(op, ring, scales);
  } else {
    check_streams(op, {{"ring", ring}});
  }
  check_gram_ring(op, ring, per_sample);
  std::vector<int64_t> slots = wanted.value_or(std::vector<int64_t>());
  if (!wanted.has_value()) {
    for (int64_t k = 0; k < ring[0].sizes[0]; ++k) slots.push_back(k);
  }
  check_gram_slots(op, ring, slots);

  std::vector<GramStream> streams;
  streams.reserve(ring.size());
  for (size_t i = 0; i < ring.size(); ++i) {
    const Tensor& r = ring[i];
    const int64_t samples = per_sample ? r.sizes[1] : 1;
    int64_t numel = 1;  // of a slot
    for (int64_t d = 1; d < r.dim; ++d) numel *= r.sizes[d];
    const DType dtype = kFloat8 ? kFloat32 : kernel_dtype(r.dtype);
    streams.push_back({dtype, samples, numel / std::max<int64_t>(samples, 1), {}});
    if (kFloat8) {
      streams.back().width = r.sizes[r.dim - 1];
      for (int64_t k : slots) streams.back().float8_slots.push_back(float8_slot(r, scales[i], k));
      continue;
    }
    streams.back().slots.reserve(slots.size());
    const char* data = static_cast<const char*>(r.data());
    for (int64_t k : slots) {
      const char* slot = data + k * r.strides[0] * r.element_size();
      streams.back().slots.emplace_back(slot, r.element_size(), r.dim - 1, r.sizes + 1, r.strides + 1);
    }
  }
  const int64_t count = static_cast<int64_t>(slots.size());
  const int64_t whole[] = {static_cast<int64_t>(ring.size()), count, count};
  const int64_t sampled[] = {whole[0], streams[0].rows, count, count};
  Tensor out = per_sample ? Tensor::empty(sampled, 4, float32_dtype()) : Tensor::empty(whole, 3, float32_dtype());
  ring_gram(streams, static_cast<float*>(out.mutable_data()));
  stack[0] = give(std::move(out));
}

// merge_attention(Tensor out, Tensor lse, Tensor out2, Tensor lse2) -> (Tensor, Tensor)
void boxed_merge_attention(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor out = take_tensor(stack[0]), lse = take_tensor(stack[1]);
  const Tensor out2 = take_tensor(stack[2]), lse2 = take_tensor(stack[3]);
  check_merge("merge_attention", out, lse, out2, lse2);
  Tensor merged = Tensor::empty(out.sizes, 4, out.dtype);
  Tensor merged_lse = Tensor::empty(lse.sizes, 3, lse.dtype);
  const Target target{merged.mutable_data(), out.element_size()};
  advise_new_memory(target.data, out.numel * out.element_size());
  merge_attention({kernel_dtype(out.dtype), kernel_dtype(out2.dtype), lse.numel, out.sizes[3], elements(out),
                   elements(lse), elements(out2), elements(lse2), target,
                   static_cast<float*>(merged_lse.mutable_data())});
  stack[0] = give(std::move(merged));
  stack[1] = give(std::move(merged_lse));
}

// ulysses_pack(Tensor[] tensors, SymInt[] splits, int scatter_dim, bool[] float8) -> Tensor
void boxed_ulysses_pack(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "ulysses_pack";
  const Tensors tensors = take_tensors(stack[0]);
  const auto splits = torch::stable::detail::to<std::vector<int64_t>>(stack[1]);
  const int64_t dim = torch::stable::detail::to<int64_t>(stack[2]);
  const auto float8 = torch::stable::detail::to<std::vector<bool>>(stack[3]);
  check_pack(op, tensors, splits, dim, float8.size());
  const Tensor& like = tensors[0];
  const UlyssesLayout layout({like.sizes, like.sizes + 4}, splits, dim, like.element_size(), float8);
  Tensor buffer = Tensor::empty(&layout.bytes, 1, aoti_torch_dtype_uint8());
  advise_new_memory(buffer.mutable_data(), layout.bytes);
  std::vector<Elements> inputs;
  inputs.reserve(tensors.size());
  for (const Tensor& tensor : tensors) inputs.push_back(elements(tensor));
  ulysses_pack(layout, kernel_dtype(like.dtype), inputs, static_cast<char*>(buffer.mutable_data()));
  stack[0] = give(std::move(buffer));
}

// ulysses_unpack(Tensor buffer, SymInt[] shape, SymInt[] splits, int gather_dim, ScalarType dtype, bool[] float8,
//                bool dequantize) -> Tensor[]
void boxed_ulysses_unpack(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "ulysses_unpack";
  const Tensor buffer = take_tensor(stack[0]);
  const auto shape = torch::stable::detail::to<std::vector<int64_t>>(stack[1]);
  const auto splits = torch::stable::detail::to<std::vector<int64_t>>(stack[2]);
  const int64_t dim = torch::stable::detail::to<int64_t>(stack[3]);
  const int32_t dtype = torch::stable::detail::to<int32_t>(stack[4]);  // in torch's numbers
  const auto float8 = torch::stable::detail::to<std::vector<bool>>(stack[5]);
  const bool dequantize = torch::stable::detail::to<bool>(stack[6]);
  check_buffer(op, buffer, shape, splits, dim, dtype);
  const UlyssesLayout layout(shape, splits, dim, aoti_torch_dtype_element_size(dtype), float8);
  check_buffer_bytes(op, buffer, layout.bytes);
  Tensors results;
  std::vector<Unpacked> tensors;
  for (bool quantised : float8) {
    const bool stays = quantised && !dequantize;
    results.push_back(Tensor::empty(shape.data(), 4, stays ? aoti_torch_dtype_float8_e4m3fn() : dtype));
    const Tensor& values = results.back();
    advise_new_memory(values.mutable_data(), values.numel * values.element_size());
    tensors.push_back({static_cast<char*>(values.mutable_data()), nullptr});
    if (stays) {
      results.push_back(Tensor::empty(shape.data(), 3, float32_dtype()));
      tensors.back().scales = static_cast<float*>(results.back().mutable_data());
    }
  }
  ulysses_unpack(layout, kernel_dtype(dtype), static_cast<const char*>(buffer.data()), tensors);
  stack[0] = give(std::move(results));
}

}  // namespace
}  // namespace cachedit

STABLE_TORCH_LIBRARY_IMPL(cachedit, CPU, m) {
  m.impl("residual_l1", cachedit::boxed_residual_l1);
  m.impl("l1", cachedit::boxed_l1);
  m.impl("residual_push", cachedit::boxed_residual_push<true>);
  m.impl("residual_push.int", cachedit::boxed_residual_push<false>);
  m.impl("residual_forecast", cachedit::boxed_residual_forecast<true>);
  m.impl("residual_forecast.floats", cachedit::boxed_residual_forecast<false>);
  m.impl("ring_gram", cachedit::boxed_ring_gram<false>);
  m.impl("residual_push_float8", cachedit::boxed_residual_push_float8<true>);
  m.impl("residual_push_float8.int", cachedit::boxed_residual_push_float8<false>);
  m.impl("residual_forecast_float8", cachedit::boxed_residual_forecast_float8<true>);
  m.impl("residual_forecast_float8.floats", cachedit::boxed_residual_forecast_float8<false>);
  m.impl("ring_gram_float8", cachedit::boxed_ring_gram<true>);
  m.impl("merge_attention", cachedit::boxed_merge_attention);
  m.impl("ulysses_pack", cachedit::boxed_ulysses_pack);
  m.impl("ulysses_unpack", cachedit::boxed_ulysses_unpack);
}
