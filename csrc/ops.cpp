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

// residual_push(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, Tensor slot) -> (), and with `int slot`
template <bool kTensorSlot>
void boxed_residual_push(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_push";
  const Tensors before = take_tensors(stack[0]), after = take_tensors(stack[1]), ring = take_tensors(stack[2]);
  const Tensor slot_tensor = kTensorSlot ? take_tensor(stack[3]) : Tensor();
  check_streams(op, {{"before", before}, {"after", after}});
  check_ring(op, {"before", before}, ring);
  check_writable(op, ring);
  int64_t slot;
  if constexpr (kTensorSlot) {
    check_slot(op, slot_tensor, {"before", before});
    slot = integer_value(slot_tensor);
  } else {
    slot = torch::stable::detail::to<int64_t>(stack[3]);
  }
  check_slot(op, slot, ring);
  check_aliases(op, {{"before", before}, {"after", after}}, ring);

  std::vector<PushStream> streams;
  streams.reserve(before.size());
  for (size_t i = 0; i < before.size(); ++i) {
    const Target whole{ring[i].mutable_data(), ring[i].element_size()};
    streams.push_back({kernel_dtype(before[i].dtype), 1, before[i].numel, elements(before[i]), elements(after[i]),
                       Target{whole.at(slot * ring[i].strides[0]), whole.element_size}});
  }
  residual_push(streams);
}

// residual_forecast(Tensor[] hidden, Tensor[] ring, Tensor weights, float base) -> Tensor[], and with `float[] weights`
template <bool kTensorWeights>
void boxed_residual_forecast(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_forecast";
  const Tensors hidden = take_tensors(stack[0]), ring = take_tensors(stack[1]);
  std::vector<float> weights;
  Tensor weights_tensor;
  if constexpr (kTensorWeights) {
    weights_tensor = take_tensor(stack[2]);
  } else {
    weights = take_floats(stack[2]);
  }
  const float base = static_cast<float>(torch::stable::detail::to<double>(stack[3]));
  check_streams(op, {{"hidden", hidden}});
  check_ring(op, {"hidden", hidden}, ring);
  if constexpr (kTensorWeights) {
    check_weights(op, weights_tensor, {"hidden", hidden}, ring);
    weights.resize(weights_tensor.numel);
    const Elements values = elements(weights_tensor);
    for (int64_t i = 0; i < weights_tensor.numel; ++i) {
      weights[i] = *static_cast<const float*>(values.read(i, 1, &weights[i]));
    }
  } else {
    check_weights(op, weights.size(), ring);
  }
  const bool per_row = kTensorWeights && weights_tensor.dim == 2;

  Tensors out;
  std::vector<ForecastStream> streams;
  out.reserve(hidden.size());
  streams.reserve(hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) {
    const Tensor& h = hidden[i];
    const Tensor& r = ring[i];
    out.push_back(Tensor::empty(h.sizes, h.dim, h.dtype));
    const Target target{out.back().mutable_data(), h.element_size()};
    advise_new_memory(target.data, h.numel * h.element_size());
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
  residual_forecast(streams, weights.data(), per_row, base);
  stack[0] = give(std::move(out));
}

// ring_gram(Tensor[] ring, int[]? slots, bool per_sample) -> Tensor
void boxed_ring_gram(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "ring_gram";
  const Tensors ring = take_tensors(stack[0]);
  const auto wanted = torch::stable::detail::to<std::optional<std::vector<int64_t>>>(stack[1]);
  const bool per_sample = torch::stable::detail::to<bool>(stack[2]);
  check_streams(op, {{"ring", ring}});
  check_gram_ring(op, ring, per_sample);
  std::vector<int64_t> slots = wanted.value_or(std::vector<int64_t>());
  if (!wanted.has_value()) {
    for (int64_t k = 0; k < ring[0].sizes[0]; ++k) slots.push_back(k);
  }
  check_gram_slots(op, ring, slots);

  std::vector<GramStream> streams;
  streams.reserve(ring.size());
  for (const Tensor& r : ring) {
    const int64_t samples = per_sample ? r.sizes[1] : 1;
    int64_t numel = 1;  // of a slot
    for (int64_t d = 1; d < r.dim; ++d) numel *= r.sizes[d];
    streams.push_back({kernel_dtype(r.dtype), samples, numel / std::max<int64_t>(samples, 1), {}});
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
  m.impl("ring_gram", cachedit::boxed_ring_gram);
  m.impl("merge_attention", cachedit::boxed_merge_attention);
  m.impl("ulysses_pack", cachedit::boxed_ulysses_pack);
  m.impl("ulysses_unpack", cachedit::boxed_ulysses_unpack);
}
