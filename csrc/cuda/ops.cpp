// The operators as torch calls them with CUDA tensors: takes over the arguments, checks them, launches the kernels.
// None is registered by loading the library: Python chooses which (cachedit_kernels/_backend.py).
#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/ulysses_layout.h"
#include "cuda/device.h"
#include "cuda/views.h"

namespace cachedit {
namespace cuda {
namespace {

// A tensor's layout; where samples are not contiguous, that of a copy.
Layout readable(const Tensor& tensor, Tensors* held) {
  const Layout layout = whole(tensor);
  return layout.in_rows() ? layout : whole(contiguous_copy(tensor, held));
}

using LaunchSums = const char* (*)(const Sums*, void*);

Tensor sums(const char* op, const std::vector<const Tensors*>& inputs, bool per_sample, LaunchSums launch) {
  const Tensors& first = *inputs[0];
  const OnDevice device(first[0]);
  const int64_t count = static_cast<int64_t>(first.size());
  const int64_t groups = per_sample ? first[0].sizes[0] : 1;
  const int64_t shape[] = {count, groups, 2};
  const int64_t whole_shape[] = {count, 2};
  Tensor out = Tensor::empty(per_sample ? shape : whole_shape, per_sample ? 3 : 2, float32_dtype(), &first[0]);
  if (groups == 0) return out;
  Tensors held;
  held.reserve(inputs.size() * count + 2);
  const int at_once = static_cast<int>(std::min<int64_t>(count, kMaxStreams));
  const Workspace space =
      workspace(op, first[0], device, at_once * groups, cachedit_cuda_partials(at_once, groups), &held);
  float* const results = static_cast<float*>(out.mutable_data());
  for (int64_t done = 0; done < count; done += kMaxStreams) {
    Sums call{};
    call.groups = groups;
    call.tickets = space.tickets;
    call.partials = space.partials;
    call.sums = results + done * groups * 2;
    for (int64_t s = done; s < std::min(count, done + kMaxStreams); ++s) {
      std::vector<Layout> layouts;
      for (const Tensors* tensors : inputs) layouts.push_back(readable((*tensors)[s], &held));
      const RowView view(layouts, per_sample);
      SumsStream& stream = call.stream[call.streams++];
      stream.dtype = kernel_dtype(first[s].dtype);
      stream.rows = view.rows / groups;
      stream.columns = view.columns;
      for (size_t i = 0; i < layouts.size(); ++i) stream.inputs[i] = view(layouts[i]);
    }
    check_launch(op, launch(&call, device.stream()));
  }
  return out;
}

// residual_l1(Tensor[] before, Tensor[] after, Tensor[] anchor, bool per_sample) -> Tensor
void boxed_residual_l1(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_l1";
  const Tensors before = take_tensors(stack[0]), after = take_tensors(stack[1]), anchor = take_tensors(stack[2]);
  const bool per_sample = torch::stable::detail::to<bool>(stack[3]);
  check_streams(op, {{"before", before}, {"after", after}, {"anchor", anchor}});
  if (per_sample) check_batch(op, {"before", before});
  stack[0] = give(sums(op, {&before, &after, &anchor}, per_sample, cachedit_cuda_residual_l1));
}

// l1(Tensor[] previous, Tensor[] current, bool per_sample) -> Tensor
void boxed_l1(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "l1";
  const Tensors previous = take_tensors(stack[0]), current = take_tensors(stack[1]);
  const bool per_sample = torch::stable::detail::to<bool>(stack[2]);
  check_streams(op, {{"previous", previous}, {"current", current}});
  if (per_sample) check_batch(op, {"previous", previous});
  stack[0] = give(sums(op, {&previous, &current}, per_sample, cachedit_cuda_l1));
}

// residual_push(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, Tensor slot) -> (), and with `int slot`
template <bool kTensorSlot>
void boxed_residual_push(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_push";
  const Tensors before = take_tensors(stack[0]), after = take_tensors(stack[1]), ring = take_tensors(stack[2]);
  const Tensor slot_tensor = kTensorSlot ? take_tensor(stack[3]) : Tensor();
  check_streams(op, {{"before", before}, {"after", after}});
  check_ring(op, {"before", before}, ring);
  check_writable(op, {"ring", ring});
  Push call{};
  call.slots = ring[0].sizes[0];
  if constexpr (kTensorSlot) {
    check_slot(op, slot_tensor, {"before", before});
    call.device_slot = slot_tensor.data();
    call.device_slot_bytes = slot_tensor.element_size();
    call.device_slot_signed = slot_tensor.dtype != aoti_torch_dtype_uint8();
  } else {
    call.slot = torch::stable::detail::to<int64_t>(stack[3]);
    check_slot(op, call.slot, ring);
  }
  check_aliases(op, {{"before", before}, {"after", after}}, {{"ring", ring}});

  const OnDevice device(before[0]);
  Tensors held;
  held.reserve(2 * before.size());
  for (size_t i = 0; i < before.size(); ++i) {
    if (before[i].numel > 0) {
      const Layout layouts[] = {readable(before[i], &held), readable(after[i], &held), slot0(ring[i])};
      const RowView view({layouts[0], layouts[1], layouts[2]}, false);
      call.stream[call.streams++] = {kernel_dtype(before[i].dtype), view.rows,        view.columns,
                                     view(layouts[0]),              view(layouts[1]), view(layouts[2]),
                                     ring[i].strides[0]};
    }
    if (call.streams == kMaxStreams || i + 1 == before.size()) {
      check_launch(op, cachedit_cuda_residual_push(&call, device.stream()));
      call.streams = 0;
    }
  }
}

// residual_forecast(Tensor[] hidden, Tensor[] ring, Tensor weights, float base) -> Tensor[], and with `float[] weights`
template <bool kTensorWeights>
void boxed_residual_forecast(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "residual_forecast";
  const Tensors hidden = take_tensors(stack[0]), ring = take_tensors(stack[1]);
  Tensor weights_tensor;
  std::vector<float> weights;
  if constexpr (kTensorWeights) {
    weights_tensor = take_tensor(stack[2]);
  } else {
    weights = take_floats(stack[2]);
  }
  Forecast call{};
  call.base = static_cast<float>(torch::stable::detail::to<double>(stack[3]));
  check_streams(op, {{"hidden", hidden}});
  check_ring(op, {"hidden", hidden}, ring);
  call.slots = ring[0].sizes[0];
  if constexpr (kTensorWeights) {
    check_weights(op, weights_tensor, {"hidden", hidden}, ring);
    call.device_weights = static_cast<const float*>(weights_tensor.data());
    call.weights_slot_stride = weights_tensor.strides[weights_tensor.dim - 1];
    call.weights_row_stride = weights_tensor.dim == 2 ? weights_tensor.strides[0] : 0;
  } else {
    check_weights(op, weights.size(), ring);
    if (weights.size() > kMaxWeights) {
      fail(std::string(op) + ": weights must be at most " + std::to_string(kMaxWeights) +
           " numbers, or a tensor, got " + std::to_string(weights.size()));
    }
    std::copy(weights.begin(), weights.end(), call.weights);
  }
  const bool per_row = kTensorWeights && weights_tensor.dim == 2;

  const OnDevice device(hidden[0]);
  Tensors out, held;
  out.reserve(hidden.size());
  held.reserve(2 * hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) {
    const Tensor& h = hidden[i];
    out.push_back(Tensor::empty(h.sizes, h.dim, h.dtype, &h));
    if (h.numel > 0) {
      const bool in_rows = call.slots == 0 || slot0(ring[i]).in_rows();
      const Tensor& r = in_rows ? ring[i] : contiguous_copy(ring[i], &held);
      const Layout layouts[] = {readable(h, &held), call.slots == 0 ? whole(out.back()) : slot0(r)};
      const RowView view({layouts[0], layouts[1]}, per_row);
      call.stream[call.streams++] = {kernel_dtype(h.dtype), view.rows,    view.columns,              view(layouts[0]),
                                     view(layouts[1]),      r.strides[0], out.back().mutable_data()};
    }
    if (call.streams == kMaxStreams || i + 1 == hidden.size()) {
      check_launch(op, cachedit_cuda_residual_forecast(&call, device.stream()));
      call.streams = 0;
    }
  }
  stack[0] = give(std::move(out));
}

// [B, L, H(, D)] as it lies where elements of D are neighbours, else a copy; strides that are never used are zero.
Attention attention(const Tensor& tensor, Tensors* held) {
  const bool adjacent = tensor.dim < 4 || tensor.sizes[3] == 1 || tensor.strides[3] == 1;
  const Layout layout = whole(adjacent ? tensor : contiguous_copy(tensor, held));
  Attention found{layout.data, {}};
  for (int d = 0; d < 3; ++d) found.strides[d] = layout.sizes[d] > 1 ? layout.strides[d] : 0;
  return found;
}

// merge_attention(Tensor out, Tensor lse, Tensor out2, Tensor lse2) -> (Tensor, Tensor)
void boxed_merge_attention(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "merge_attention";
  const Tensor out = take_tensor(stack[0]), lse = take_tensor(stack[1]);
  const Tensor out2 = take_tensor(stack[2]), lse2 = take_tensor(stack[3]);
  check_merge(op, out, lse, out2, lse2);
  const OnDevice device(out);
  Tensor merged = Tensor::empty(out.sizes, out.dim, out.dtype, &out);
  Tensor merged_lse = Tensor::empty(lse.sizes, lse.dim, lse.dtype, &lse);
  if (lse.numel > 0) {
    Tensors held;
    held.reserve(2);
    const Merge call{kernel_dtype(out.dtype),
                     kernel_dtype(out2.dtype),
                     out.sizes[0],
                     out.sizes[1],
                     out.sizes[2],
                     out.sizes[3],
                     attention(out, &held),
                     attention(lse, &held),
                     attention(out2, &held),
                     attention(lse2, &held),
                     merged.mutable_data(),
                     static_cast<float*>(merged_lse.mutable_data())};
    check_launch(op, cachedit_cuda_merge_attention(&call, device.stream()));
  }
  stack[0] = give(std::move(merged));
  stack[1] = give(std::move(merged_lse));
}

using LaunchExchange = const char* (*)(const Exchange*, void*);

// All of a call's tensors and peers, a few at a time.
void launch_exchange(const char* op, const UlyssesLayout& layout, DType dtype, const std::vector<Exchanged>& tensors,
                     char* buffer, LaunchExchange launch, void* stream) {
  Exchange call{};
  call.dtype = dtype;
  call.batch = layout.batch;
  call.length = layout.length;
  call.heads = layout.heads;
  call.head_dim = layout.head_dim;
  call.dim = static_cast<int>(layout.dim);
  call.buffer = buffer;
  for (const Exchanged& each : tensors) ++(each.float8 ? call.quantised : call.plain);
  for (size_t t = 0; t < tensors.size(); t += call.tensors) {
    call.tensors = static_cast<int>(std::min<size_t>(tensors.size() - t, kMaxTensors));
    std::copy_n(tensors.begin() + t, call.tensors, call.tensor);
    for (size_t p = 0; p < layout.blocks.size(); p += call.peers) {
      call.peers = static_cast<int>(std::min<size_t>(layout.blocks.size() - p, kMaxPeers));
      for (int i = 0; i < call.peers; ++i) {
        const UlyssesLayout::Block& block = layout.blocks[p + i];
        call.peer[i] = {block.start, block.size, block.rows, block.offset};
      }
      check_launch(op, launch(&call, stream));
    }
  }
}

// Tensors that travel alike are numbered from zero.
int number(const std::vector<Exchanged>& tensors, bool float8) {
  return static_cast<int>(
      std::count_if(tensors.begin(), tensors.end(), [&](const Exchanged& each) { return each.float8 == float8; }));
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
  const OnDevice device(like);
  Tensor buffer = Tensor::empty(&layout.bytes, 1, aoti_torch_dtype_uint8(), &like);
  if (layout.bytes > 0) {
    Tensors held;
    std::vector<Exchanged> sources;
    for (size_t t = 0; t < tensors.size(); ++t) {
      sources.push_back({attention(tensors[t], &held), nullptr, float8[t], number(sources, float8[t])});
    }
    launch_exchange(op, layout, kernel_dtype(like.dtype), sources, static_cast<char*>(buffer.mutable_data()),
                    cachedit_cuda_ulysses_pack, device.stream());
  }
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
  const OnDevice device(buffer);
  Tensors results, held;
  std::vector<Exchanged> targets;
  for (bool quantised : float8) {
    const bool stays = quantised && !dequantize;
    results.push_back(Tensor::empty(shape.data(), 4, stays ? aoti_torch_dtype_float8_e4m3fn() : dtype, &buffer));
    targets.push_back({{results.back().mutable_data(), {}}, nullptr, quantised, number(targets, quantised)});
    if (stays) {
      results.push_back(Tensor::empty(shape.data(), 3, float32_dtype(), &buffer));
      targets.back().scales = static_cast<float*>(results.back().mutable_data());
    }
  }
  if (layout.bytes > 0) {
    const bool aligned = reinterpret_cast<uintptr_t>(buffer.data()) % kAlignment == 0;
    const Tensor& source = aligned ? buffer : contiguous_copy(buffer, &held);
    launch_exchange(op, layout, kernel_dtype(dtype), targets, static_cast<char*>(const_cast<void*>(source.data())),
                    cachedit_cuda_ulysses_unpack, device.stream());
  }
  stack[0] = give(std::move(results));
}

constexpr struct {
  const char* overload;
  void (*function)(StableIValue*, uint64_t, uint64_t);
} kOperators[] = {
    {"residual_l1", boxed_residual_l1},
    {"l1", boxed_l1},
    {"residual_push", boxed_residual_push<true>},
    {"residual_push.int", boxed_residual_push<false>},
    {"residual_forecast", boxed_residual_forecast<true>},
    {"residual_forecast.floats", boxed_residual_forecast<false>},
    {"merge_attention", boxed_merge_attention},
    {"ulysses_pack", boxed_ulysses_pack},
    {"ulysses_unpack", boxed_ulysses_unpack},
};

}  // namespace
}  // namespace cuda
}  // namespace cachedit

// Registers one overload for a dispatch key; false where there is no kernel for it.
extern "C" __attribute__((visibility("default"))) bool cachedit_cuda_register(const char* overload, const char* key) {
  using torch::stable::detail::StableLibrary;
  for (const auto& each : cachedit::cuda::kOperators) {
    if (std::strcmp(each.overload, overload) != 0) continue;
    auto* library = new StableLibrary(StableLibrary::Kind::IMPL, "cachedit", key, __FILE__, __LINE__);
    library->impl(each.overload, each.function);  // never deleted, as registrations are when a library goes
    return true;
  }
  return false;
}
