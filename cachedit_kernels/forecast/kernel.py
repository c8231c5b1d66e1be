"""Triton kernel that forecasts hidden states from stored residuals: `residual_forecast`.

The launch function carries the operator's name and takes checked tensors (equal shapes within a stream, one device) of
any strides. All streams go out in one launch, up to four of them; they may differ in shape and dtype.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions as its own types.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachedit_kernels.launch import (
    MAX_STREAMS_PER_LAUNCH,
    RowView,
    is_laid_out_in_rows,
    on_device_of,
    row_view,
)

NUM_WARPS = 4
BYTES_PER_THREAD = 32  # of each tensor that a program reads: two 16-byte accesses, so four and more are in flight


@triton.jit(do_not_specialize=["weights_sample_stride", "weights_slot_stride"])
def _residual_forecast_kernel(
    hidden,
    slot0,
    output,
    row_numel,
    hidden_stride,
    slot0_stride,
    slot_stride,
    rows,
    weights,
    weights_sample_stride,
    weights_slot_stride,
    base,
    SLOTS: tl.constexpr,
    DEVICE_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """output = base * hidden + sum_k weights[k] * ring[k], accumulated in fp32 in this order and rounded once.

    `weights` is a tuple of scalars, or a pointer to float32 [SLOTS] (sample stride 0) or [B, SLOTS]. What would be
    multiplied by zero is not read: its memory may never have been written, and its bytes need not move.
    The grid is (tiles of the largest stream, streams).
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    base = tl.full([BLOCK], base, tl.float32)
    for s in tl.static_range(len(hidden)):
        tiles = tl.cdiv(row_numel[s], BLOCK)
        if (tl.program_id(1) == s) & (program < rows[s] * tiles):
            row = (program // tiles).to(tl.int64)
            start = (program % tiles).to(tl.int64) * BLOCK
            mask = lanes < row_numel[s] - start
            # A zero switches loads off through their mask: no branch, so all loads of a program are in flight together.
            h = tl.load(hidden[s] + (row * hidden_stride[s] + start) + lanes, mask=mask & (base != 0.0), other=0.0)
            forecast = h.to(tl.float32) * base
            residuals = slot0[s] + (row * slot0_stride[s] + start)
            for k in tl.static_range(SLOTS):
                if DEVICE_WEIGHTS:
                    scalar = tl.load(weights + row * weights_sample_stride + k * weights_slot_stride)
                else:
                    scalar = weights[k]
                weight = tl.full([BLOCK], scalar, tl.float32)
                slot = residuals + tl.full([], k, tl.int64) * slot_stride[s]
                r = tl.load(slot + lanes, mask=mask & (weight != 0.0), other=0.0)
                forecast += r.to(tl.float32) * weight
            result = forecast.to(output[s].dtype.element_ty)
            tl.store(output[s] + (row * row_numel[s] + start) + lanes, result, mask=mask)


def residual_forecast(
    hidden: Sequence[Tensor], ring: Sequence[Tensor], weights: Sequence[float] | Tensor, base: float = 1.0
) -> list[Tensor]:
    """base * hidden[s] + sum_k weights[k] * ring[s][k] for every stream, as new contiguous tensors of hidden's dtype.

    `weights`: K floats, or float32 [K], or float32 [B, K] with one row per sample; tensors are read by the kernel.
    """
    slots = len(weights) if not isinstance(weights, Tensor) else weights.shape[-1]
    per_sample = isinstance(weights, Tensor) and weights.dim() == 2
    outputs = [torch.empty(h.shape, dtype=h.dtype, device=h.device) for h in hidden]
    streams = []  # what is read, the distance between the ring's slots, and where the result goes
    for h, r, output in zip(hidden, ring, outputs, strict=True):
        if h.numel() == 0:
            continue
        slot0 = r[0] if slots > 0 else h
        if not is_laid_out_in_rows(slot0):
            r = r.clone(memory_format=torch.contiguous_format)
            slot0 = r[0]
        streams.append((row_view((h, slot0), split=per_sample), r.stride(0), output))
    for i in range(0, len(streams), MAX_STREAMS_PER_LAUNCH):
        _launch(streams[i : i + MAX_STREAMS_PER_LAUNCH], slots, weights, float(base))
    return outputs


def _launch(
    streams: list[tuple[RowView, int, Tensor]], slots: int, weights: Sequence[float] | Tensor, base: float
) -> None:
    views = [view for view, _, _ in streams]
    outputs = tuple(output for _, _, output in streams)
    block = 32 * NUM_WARPS * BYTES_PER_THREAD // max(view.element_size for view in views)
    grid = (max(view.rows * view.tiles(block) for view in views), len(views))
    on_device = isinstance(weights, Tensor)
    sample_stride = weights.stride(0) if isinstance(weights, Tensor) and weights.dim() == 2 else 0
    slot_stride = weights.stride(-1) if isinstance(weights, Tensor) else 0
    with on_device_of(outputs[0]):
        _residual_forecast_kernel[grid](
            *zip(*(view.tensors for view in views), strict=True),
            outputs,
            tuple(view.row_numel for view in views),
            *zip(*(view.strides for view in views), strict=True),
            tuple(distance for _, distance, _ in streams),
            tuple(view.rows for view in views),
            weights if on_device else tuple(float(weight) for weight in weights),
            sample_stride,
            slot_stride,
            base,
            SLOTS=slots,
            DEVICE_WEIGHTS=on_device,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
