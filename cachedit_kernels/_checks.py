"""What the operators refuse, and in which words.

The C++ operators make the same checks (csrc/checks.cpp) in the same order with the same messages; these serve the
implementations in Python and the fakes. Everything is checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, buffer_bytes, layout

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_GRAM_SLOTS = 16


def residual_l1(before: Sequence[Tensor], after: Sequence[Tensor], anchor: Sequence[Tensor], per_sample: bool) -> None:
    _streams("residual_l1", {"before": before, "after": after, "anchor": anchor})
    if per_sample:
        _batch("residual_l1", "before", before)


def l1(previous: Sequence[Tensor], current: Sequence[Tensor], per_sample: bool) -> None:
    _streams("l1", {"previous": previous, "current": current})
    if per_sample:
        _batch("l1", "previous", previous)


def residual_push(
    before: Sequence[Tensor], after: Sequence[Tensor], ring: Sequence[Tensor], slot: Tensor | int
) -> None:
    op = "residual_push"
    _streams(op, {"before": before, "after": after})
    _ring(op, "before", before, ring)
    _writable(op, "ring", ring)
    _slot(op, slot, before, ring)
    _no_aliases(op, {"before": before, "after": after}, {"ring": ring})


def residual_push_float8(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    ring: Sequence[Tensor],
    slot: Tensor | int,
    scales: Sequence[Tensor],
) -> None:
    op = "residual_push_float8"
    _streams(op, {"before": before, "after": after})
    _ring(op, "before", before, ring, float8=True)
    _scales(op, ring, scales)
    _slot(op, slot, before, ring)
    _no_aliases(op, {"before": before, "after": after}, {"ring": ring, "scales": scales})


def residual_forecast(
    hidden: Sequence[Tensor], ring: Sequence[Tensor], weights: Tensor | Sequence[float], base: float
) -> None:
    op = "residual_forecast"
    _streams(op, {"hidden": hidden})
    _ring(op, "hidden", hidden, ring)
    _weights(op, weights, hidden, ring)


def residual_forecast_float8(
    hidden: Sequence[Tensor],
    ring: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    base: float,
    scales: Sequence[Tensor],
) -> None:
    op = "residual_forecast_float8"
    _streams(op, {"hidden": hidden})
    _ring(op, "hidden", hidden, ring, float8=True)
    _scales(op, ring, scales)
    _weights(op, weights, hidden, ring)


def _weights(op: str, weights: Tensor | Sequence[float], hidden: Sequence[Tensor], ring: Sequence[Tensor]) -> None:
    slots = ring[0].shape[0]
    if not isinstance(weights, Tensor):
        if len(weights) != slots:
            _refuse(op, f"weights must have one value per ring slot, {slots}, got {len(weights)}")
        return
    if weights.dtype != torch.float32:
        _refuse(op, f"weights must be float32, got {_dtype(weights.dtype)}")
    _same_device(op, "weights", weights, "hidden", hidden)
    if weights.dim() not in (1, 2) or weights.shape[-1] != slots:
        _refuse(op, f"weights must have the shape ({slots},) or (batch, {slots}), got {_tuple(weights.shape)}")
    if weights.dim() == 2:
        for i, h in enumerate(hidden):
            if h.dim() == 0 or h.shape[0] != weights.shape[0]:
                _refuse(
                    op,
                    f"hidden[{i}] must have the batch size of weights, {weights.shape[0]}, in dimension 0, "
                    f"got shape {_tuple(h.shape)}",
                )


def ring_gram(ring: Sequence[Tensor], slots: Sequence[int] | None, per_sample: bool) -> None:
    op = "ring_gram"
    _streams(op, {"ring": ring})
    _gram(op, ring, slots, per_sample)


def ring_gram_float8(
    ring: Sequence[Tensor], slots: Sequence[int] | None, per_sample: bool, scales: Sequence[Tensor]
) -> None:
    op = "ring_gram_float8"
    if len(ring) == 0:
        _refuse(op, "ring must have at least one tensor, got an empty list")
    for i, r in enumerate(ring):
        _same_device(op, f"ring[{i}]", r, "ring", ring)
        _float8(op, i, r)
    _scales(op, ring, scales)
    _gram(op, ring, slots, per_sample)


def _gram(op: str, ring: Sequence[Tensor], slots: Sequence[int] | None, per_sample: bool) -> None:
    dims = 2 if per_sample else 1
    for i, r in enumerate(ring):
        if r.dim() < dims:
            wanted = "a slot and a batch dimension for per_sample" if per_sample else "a slot dimension"
            _refuse(op, f"ring[{i}] must have {wanted}, got shape {_tuple(r.shape)}")
        if r.shape[0] != ring[0].shape[0]:
            _refuse(op, f"ring[{i}] must have as many slots as ring[0], {ring[0].shape[0]}, got {r.shape[0]}")
        if per_sample and r.shape[1] != ring[0].shape[1]:
            _refuse(op, f"ring[{i}] must have the batch size of ring[0], {ring[0].shape[1]}, got {r.shape[1]}")
    for i, slot in enumerate(slots or ()):
        if not 0 <= slot < ring[0].shape[0]:
            _refuse(op, f"slots[{i}] must be in [0, {ring[0].shape[0]}), got {slot}")
    count = ring[0].shape[0] if slots is None else len(slots)
    if count > MAX_GRAM_SLOTS:
        _refuse(op, f"at most {MAX_GRAM_SLOTS} slots can be multiplied at once, got {count}")


def merge_attention(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> None:
    op = "merge_attention"
    _attention_shape(op, "out", out)
    _on_device(op, "out2", out2, "out", out)
    if out2.dtype not in (FLOATS if out.dtype == torch.float32 else (out.dtype,)):
        wanted = "float32, float16 or bfloat16" if out.dtype == torch.float32 else f"{_dtype(out.dtype)}, as out is"
        _refuse(op, f"out2 must be {wanted}, got {_dtype(out2.dtype)}")
    if out2.shape != out.shape:
        _refuse(op, f"out2 must have the shape of out, {_tuple(out.shape)}, got {_tuple(out2.shape)}")
    for name, tensor in (("lse", lse), ("lse2", lse2)):
        _on_device(op, name, tensor, "out", out)
        if tensor.dtype != torch.float32:
            _refuse(op, f"{name} must be float32, got {_dtype(tensor.dtype)}")
        if tensor.shape != out.shape[:3]:
            _refuse(op, f"{name} must have the shape {_tuple(out.shape[:3])}, got {_tuple(tensor.shape)}")


def ulysses_pack(tensors: Sequence[Tensor], splits: Sequence[int], scatter_dim: int, float8: Sequence[bool]) -> None:
    op = "ulysses_pack"
    attention_tensors(op, tensors, float8)
    _ulysses_splits(op, "scatter_dim", scatter_dim, splits, tensors[0].shape)


def are_tensors(op: str, **arguments: object) -> None:
    """What a schema says, but for None, which passes for a tensor there."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            _refuse(op, f"{name} must be a tensor, got {type(value).__name__}")


def attention_tensors(op: str, tensors: Sequence[Tensor], float8: Sequence[bool]) -> None:
    """At least one [B, L, H, D], and all alike; `float8` has a value for each."""
    if len(tensors) == 0:
        _refuse(op, "tensors must have at least one tensor, got an empty list")
    like = tensors[0]
    _attention_shape(op, "tensors[0]", like)
    for i, tensor in enumerate(tensors):
        _same_device(op, f"tensors[{i}]", tensor, "tensors", tensors)
        if tensor.dtype != like.dtype:
            _refuse(
                op, f"tensors[{i}] must have the dtype of tensors[0], {_dtype(like.dtype)}, got {_dtype(tensor.dtype)}"
            )
        if tensor.shape != like.shape:
            _refuse(
                op, f"tensors[{i}] must have the shape of tensors[0], {_tuple(like.shape)}, got {_tuple(tensor.shape)}"
            )
    if len(float8) != len(tensors):
        _refuse(op, f"float8 must have one value per tensor, {len(tensors)}, got {len(float8)}")


def ulysses_unpack(
    buffer: Tensor,
    shape: Sequence[int],
    splits: Sequence[int],
    gather_dim: int,
    dtype: torch.dtype,
    float8: Sequence[bool],
    dequantize: bool,
) -> None:
    op = "ulysses_unpack"
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        described = f"{_dtype(buffer.dtype)} of shape {_tuple(buffer.shape)} and strides {_tuple(buffer.stride())}"
        _refuse(op, f"buffer must be contiguous uint8 of one dimension, got {described}")
    if dtype not in FLOATS:
        _refuse(op, f"dtype must be float32, float16 or bfloat16, got {_dtype(dtype)}")
    if len(shape) != 4 or any(size < 0 for size in shape):
        _refuse(op, f"shape must be (batch, length, heads, head_dim), got {_tuple(shape)}")
    _ulysses_splits(op, "gather_dim", gather_dim, splits, shape)
    nbytes = buffer_bytes(layout(shape, splits, gather_dim, dtype.itemsize, float8))
    if buffer.numel() != nbytes:
        _refuse(op, f"buffer must have {nbytes} bytes, got {buffer.numel()}")


def _ulysses_splits(op: str, name: str, dim: int, splits: Sequence[int], shape: Sequence[int]) -> None:
    if dim not in (SEQUENCE, HEADS):
        _refuse(op, f"{name} must be 1 (sequence) or 2 (heads), got {dim}")
    if any(size < 0 for size in splits) or sum(splits) != shape[dim]:
        _refuse(op, f"splits must be sizes that add up to {shape[dim]}, dimension {dim}, got {_tuple(splits)}")


def _attention_shape(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        _refuse(op, f"{name} must be float32, float16 or bfloat16, got {_dtype(tensor.dtype)}")
    if tensor.dim() != 4:
        _refuse(op, f"{name} must have the shape (batch, length, heads, head_dim), got {_tuple(tensor.shape)}")


def _streams(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    """Every list as long as the first; every tensor of a stream alike; every tensor on one device."""
    first, reference = next(iter(lists.items()))
    if len(reference) == 0:
        _refuse(op, f"{first} must have at least one tensor, got an empty list")
    for name, tensors in lists.items():
        if len(tensors) != len(reference):
            _refuse(op, f"{name} must have as many tensors as {first}, {len(reference)}, got {len(tensors)}")
    for i, like in enumerate(reference):
        if like.dtype not in FLOATS:
            _refuse(op, f"{first}[{i}] must be float32, float16 or bfloat16, got {_dtype(like.dtype)}")
        for name, tensors in lists.items():
            tensor = tensors[i]
            _same_device(op, f"{name}[{i}]", tensor, first, reference)
            if tensor.dtype != like.dtype:
                _refuse(
                    op,
                    f"{name}[{i}] must have the dtype of {first}[{i}], {_dtype(like.dtype)}, "
                    f"got {_dtype(tensor.dtype)}",
                )
            if tensor.shape != like.shape:
                _refuse(
                    op,
                    f"{name}[{i}] must have the shape of {first}[{i}], {_tuple(like.shape)}, "
                    f"got {_tuple(tensor.shape)}",
                )


def _ring(op: str, first: str, streams: Sequence[Tensor], ring: Sequence[Tensor], float8: bool = False) -> None:
    """Per stream [K, *shape] of its dtype, or in E4M3; K equal everywhere."""
    if len(ring) != len(streams):
        _refuse(op, f"ring must have as many tensors as {first}, {len(streams)}, got {len(ring)}")
    for i, (r, like) in enumerate(zip(ring, streams, strict=True)):
        _same_device(op, f"ring[{i}]", r, first, streams)
        if float8:
            _float8(op, i, r)
        elif r.dtype != like.dtype:
            _refuse(op, f"ring[{i}] must have the dtype of {first}[{i}], {_dtype(like.dtype)}, got {_dtype(r.dtype)}")
        if r.dim() != like.dim() + 1 or r.shape[1:] != like.shape:
            _refuse(
                op,
                f"ring[{i}] must have the shape of {first}[{i}], {_tuple(like.shape)}, behind its slots, "
                f"got {_tuple(r.shape)}",
            )
        if r.shape[0] != ring[0].shape[0]:
            _refuse(op, f"ring[{i}] must have as many slots as ring[0], {ring[0].shape[0]}, got {r.shape[0]}")


def _float8(op: str, i: int, r: Tensor) -> None:
    if r.dtype != E4M3:
        _refuse(op, f"ring[{i}] must be float8_e4m3fn, got {_dtype(r.dtype)}")


def _scales(op: str, ring: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """A float32 scale for each row, the last dimension; slots of both contiguous and apart."""
    if len(scales) != len(ring):
        _refuse(op, f"scales must have as many tensors as ring, {len(ring)}, got {len(scales)}")
    for i, (r, s) in enumerate(zip(ring, scales, strict=True)):
        _same_device(op, f"scales[{i}]", s, "ring", ring)
        if s.dtype != torch.float32:
            _refuse(op, f"scales[{i}] must be float32, got {_dtype(s.dtype)}")
        if r.dim() < 2:
            _refuse(
                op,
                f"ring[{i}] must have rows to scale, a dimension behind its slots, got shape {_tuple(r.shape)}",
            )
        if s.shape != r.shape[:-1]:
            _refuse(
                op,
                f"scales[{i}] must have the shape of ring[{i}] without its last dimension, {_tuple(r.shape[:-1])}, "
                f"got {_tuple(s.shape)}",
            )
    _writable(op, "ring", ring)
    _writable(op, "scales", scales)


def _writable(op: str, name: str, ring: Sequence[Tensor]) -> None:
    for i, r in enumerate(ring):
        if not r[:1].is_contiguous():
            _refuse(op, f"{name}[{i}] must be contiguous within each slot, got strides {_tuple(r.stride())}")
        if r.shape[0] > 1 and r.stride(0) < r[0].numel():
            _refuse(op, f"{name}[{i}] must have slots that do not overlap, got strides {_tuple(r.stride())}")


def _slot(op: str, slot: Tensor | int, before: Sequence[Tensor], ring: Sequence[Tensor]) -> None:
    slots = ring[0].shape[0]
    if isinstance(slot, Tensor):
        if slot.numel() != 1 or slot.dtype not in INTEGERS:
            _refuse(op, f"slot must be one integer, got {_dtype(slot.dtype)} of shape {_tuple(slot.shape)}")
        _same_device(op, "slot", slot, "before", before)
        if slot.device.type == "cpu" and not is_fake(slot):  # elsewhere, reading it would wait for the device
            slot = int(slot)
    if not isinstance(slot, Tensor) and not 0 <= slot < slots:
        _refuse(op, f"slot must be in [0, {slots}), got {slot}")


def _batch(op: str, first: str, streams: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(streams):
        if tensor.dim() == 0:
            _refuse(op, f"{first}[{i}] must have a batch dimension for per_sample, got shape ()")
        if tensor.shape[0] != streams[0].shape[0]:
            _refuse(
                op, f"{first}[{i}] must have the batch size of {first}[0], {streams[0].shape[0]}, got {tensor.shape[0]}"
            )


def _same_device(op: str, what: str, tensor: Tensor, first: str, reference: Sequence[Tensor]) -> None:
    _on_device(op, what, tensor, f"{first}[0]", reference[0])


def _on_device(op: str, what: str, tensor: Tensor, first: str, like: Tensor) -> None:
    if tensor.device != like.device:
        _refuse(op, f"{what} must be on the device of {first}, {like.device}, got {tensor.device}")


def _no_aliases(op: str, inputs: dict[str, Sequence[Tensor]], written: dict[str, Sequence[Tensor]]) -> None:
    others = [(f"{name}[{i}]", tensor) for name, tensors in inputs.items() for i, tensor in enumerate(tensors)]
    targets = [(f"{name}[{i}]", tensor) for name, tensors in written.items() for i, tensor in enumerate(tensors)]
    if any(is_fake(tensor) or tensor.is_meta for _, tensor in (*others, *targets)):
        return
    for i, (target, tensor) in enumerate(targets):
        start, stop = _extent(tensor)
        for name, other in (*others, *targets[:i]):
            low, high = _extent(other)
            if low < stop and start < high:
                _refuse(op, f"{target} must not share memory with {name}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and the byte past the last one; the same number twice where there are no elements."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _refuse(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"{op}: {message}")


def _tuple(values: Sequence[int]) -> str:
    return str(tuple(values))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
