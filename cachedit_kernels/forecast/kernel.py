"""Triton kernels that forecast hidden states from stored residuals: `residual_forecast`, `residual_forecast_float8`.

The launch functions carry the operators' names and take checked tensors (equal shapes within a stream, one device) of
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
    TokenView,
    is_laid_out_in_rows,
    on_device_of,
    row_view,
    token_tile,
    token_view,
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


@triton.jit(do_not_specialize=["weights_sample_stride", "weights_slot_stride"])
def _residual_forecast_float8_kernel(
    hidden,
    ring,
    scales,
    output,
    rows,
    columns,
    rows_per_sample,
    hidden_stride,
    ring_stride,
    scales_stride,
    weights,
    weights_sample_stride,
    weights_slot_stride,
    base,
    SLOTS: tl.constexpr,
    DEVICE_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """output = base * hidden + sum_k (weights[k] * scales[k]) * ring[k], as above, with a scale per row.

    Stream s has `rows[s]` rows of `columns[s]`; hidden's stride is between samples, those of ring and scales between
    slots. The grid is (tiles of the largest stream, streams); a tile is ROWS rows of COLUMNS.
    """
    program = tl.program_id(0)
    base = tl.full([ROWS, COLUMNS], base, tl.float32)
    for s in tl.static_range(len(hidden)):
        across = tl.cdiv(columns[s], COLUMNS)
        first = (program // across) * ROWS
        if (tl.program_id(1) == s) & (first < rows[s]):
            row = first + tl.arange(0, ROWS)
            column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = row < rows[s]
            mask = inside[:, None] & (column < columns[s])
            sample = (row // rows_per_sample[s]).to(tl.int64)
            token = (row % rows_per_sample[s]).to(tl.int64)
            source = hidden[s] + (sample * hidden_stride[s] + token * columns[s])[:, None] + column
            place = row.to(tl.int64)[:, None] * columns[s] + column
            h = tl.load(source, mask=mask & (base != 0.0), other=0.0)
            forecast = h.to(tl.float32) * base
            for k in tl.static_range(SLOTS):
                if DEVICE_WEIGHTS:
                    weight = tl.load(weights + sample * weights_sample_stride + k * weights_slot_stride, mask=inside)
                else:
                    weight = tl.full([ROWS], weights[k], tl.float32)
                used = inside & (weight != 0.0)
                slot = tl.full([], k, tl.int64)
                scale = tl.load(scales[s] + slot * scales_stride[s] + row, mask=used, other=0.0)
                code = tl.load(ring[s] + slot * ring_stride[s] + place, mask=mask & used[:, None], other=0.0)
                forecast += code.to(tl.float32) * (weight * scale)[:, None]
            tl.store(output[s] + place, forecast.to(output[s].dtype.element_ty), mask=mask)


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


def residual_forecast_float8(
    hidden: Sequence[Tensor],
    ring: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    base: float,
    scales: Sequence[Tensor],
) -> list[Tensor]:
    """The same from rings in E4M3, whose slots and those of their scales are contiguous."""
    per_sample = isinstance(weights, Tensor) and weights.dim() == 2
    outputs = [torch.empty(h.shape, dtype=h.dtype, device=h.device) for h in hidden]
    streams = []
    for h, r, c, output in zip(hidden, ring, scales, outputs, strict=True):
        if h.numel() > 0:
            streams.append((token_view((h,), split=per_sample), r, c, output))
    for i in range(0, len(streams), MAX_STREAMS_PER_LAUNCH):
        _launch_float8(streams[i : i + MAX_STREAMS_PER_LAUNCH], weights, float(base))
    return outputs


def _launch(
    streams: list[tuple[RowView, int, Tensor]], slots: int, weights: Sequence[float] | Tensor, base: float
) -> None:
    views = [view for view, _, _ in streams]
    outputs = tuple(output for _, _, output in streams)
    block = 32 * NUM_WARPS * BYTES_PER_THREAD // max(view.element_size for view in views)
    grid = (max(view.rows * view.tiles(block) for view in views), len(views))
    with on_device_of(outputs[0]):
        _residual_forecast_kernel[grid](
            *zip(*(view.tensors for view in views), strict=True),
            outputs,
            tuple(view.row_numel for view in views),
            *zip(*(view.strides for view in views), strict=True),
            tuple(distance for _, distance, _ in streams),
            tuple(view.rows for view in views),
            *_weights(weights),
            base,
            SLOTS=slots,
            DEVICE_WEIGHTS=isinstance(weights, Tensor),
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def _launch_float8(
    streams: list[tuple[TokenView, Tensor, Tensor, Tensor]], weights: Sequence[float] | Tensor, base: float
) -> None:
    views, ring, scales, outputs = zip(*streams, strict=True)
    rows, columns = token_tile(views)
    tiles = (triton.cdiv(view.rows, rows) * triton.cdiv(view.columns, columns) for view in views)
    with on_device_of(outputs[0]):
        _residual_forecast_float8_kernel[max(tiles), len(views)](
            tuple(view.tensors[0] for view in views),
            ring,
            scales,
            outputs,
            tuple(view.rows for view in views),
            tuple(view.columns for view in views),
            tuple(view.rows_per_sample for view in views),
            tuple(view.strides[0] for view in views),
            tuple(r.stride(0) for r in ring),
            tuple(c.stride(0) for c in scales),
            *_weights(weights),
            base,
            SLOTS=ring[0].shape[0],
            DEVICE_WEIGHTS=isinstance(weights, Tensor),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )


def _weights(weights: Sequence[float] | Tensor) -> tuple[Tensor | tuple[float, ...], int, int]:
    """The weights as a kernel takes them, and the distances between samples and between slots of a tensor."""
    if isinstance(weights, Tensor):
        return weights, weights.stride(0) if weights.dim() == 2 else 0, weights.stride(-1)
    return tuple(float(weight) for weight in weights), 0, 0
