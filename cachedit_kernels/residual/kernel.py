"""Triton kernels that measure and store residuals: `residual_l1`, `l1`, `residual_push`, `residual_push_float8`.

The launch functions carry the operators' names and take checked tensors (equal shapes within a stream, one device) of
any strides. All streams go out in one launch, up to four of them; they may differ in shape and dtype.

A sum is made in two stages inside one kernel. Every program adds up its share of a group (a stream, or one sample of
it) into a partial; whichever program of the group finishes last, told by an integer ticket, adds the partials in the
order of their index. No float is ever added atomically, so equal inputs give equal bits.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions as its own types.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachedit_kernels.float8.kernel import row_codes, row_magnitudes, row_scales
from cachedit_kernels.launch import (
    MAX_STREAMS_PER_LAUNCH,
    RowView,
    TokenView,
    on_device_of,
    programs_per_group,
    row_view,
    tickets_for,
    token_tile,
    token_view,
)

NUM_WARPS = 4
# Elements that a program takes at once, by the largest element size among the tensors of a launch. What counts is the
# bytes in flight: 16 to 32 of each of three tensors per thread beside two accumulators per element (reductions), 64 of
# each of two tensors (push); with more, the assembler puts loads off for want of registers.
REDUCE_BLOCK = {2: 1024, 4: 1024}
PUSH_BLOCK = {2: 4096, 4: 2048}
FINAL_BLOCK = 1024  # partials that the last program of a group reads at once


@triton.jit
def _load_fp32(row, lanes, mask):
    return tl.load(row + lanes, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish_group(difference, magnitude, group, position, programs, partials, tickets, sums, FINAL_BLOCK: tl.constexpr):
    """sums[group] = sum_p partials[group, p], pairs all of them; by whichever of the group's programs finishes last.

    `position` is this program's place among the group's `programs`.
    """
    first = partials + 2 * group.to(tl.int64) * programs
    tl.store(first + 2 * position, difference)
    tl.store(first + 2 * position + 1, magnitude)
    # The barrier orders both stores before the ticket whichever threads made them; the ticket's release publishes them
    # to the device, its acquire lets the last program see those of the others.
    tl.debug_barrier()
    arrived = tl.atomic_add(tickets + group, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
        lanes = tl.arange(0, FINAL_BLOCK)
        differences = tl.zeros([FINAL_BLOCK], tl.float32)
        magnitudes = tl.zeros([FINAL_BLOCK], tl.float32)
        for start in range(0, programs, FINAL_BLOCK):
            mask = lanes < programs - start
            # .cg reads L2, where the other programs' stores are; L1 may hold older lines.
            differences += tl.load(first + 2 * (start + lanes), mask=mask, other=0.0, cache_modifier=".cg")
            magnitudes += tl.load(first + 2 * (start + lanes) + 1, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(sums + 2 * group, tl.sum(differences))
        tl.store(sums + 2 * group + 1, tl.sum(magnitudes))
        tl.store(tickets + group, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["programs", "groups"])
def _l1_kernel(
    before,
    after,
    anchor,
    row_numel,
    before_stride,
    after_stride,
    anchor_stride,
    rows,
    programs,
    groups,
    partials,
    tickets,
    sums,
    ONE_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    FINAL_BLOCK: tl.constexpr,
):
    """sums[s, g] = (sum |(after - before) - anchor|, sum |anchor|) over group g of stream s, in fp32.

    Without anchors: (sum |after - before|, sum |before|). Stream s has `groups` groups of `rows[s]` rows of
    `row_numel[s]` elements each. The grid is (groups * programs, streams): `programs` programs share a group.
    """
    group = tl.program_id(0) // programs
    position = tl.program_id(0) % programs
    lanes = tl.arange(0, BLOCK)
    for s in tl.static_range(len(before)):
        if tl.program_id(1) == s:
            tiles = tl.cdiv(row_numel[s], BLOCK)
            differences = tl.zeros([BLOCK], tl.float32)
            magnitudes = tl.zeros([BLOCK], tl.float32)
            for tile in range(position, rows[s] * tiles, programs):
                if ONE_ROW:  # groups of one row, the usual case, are spared two divisions per tile
                    row = group.to(tl.int64)
                    start = tl.cast(tile, tl.int64) * BLOCK
                else:
                    row = (group * rows[s] + tile // tiles).to(tl.int64)
                    start = (tile % tiles).to(tl.int64) * BLOCK
                mask = lanes < row_numel[s] - start
                x = _load_fp32(before[s] + (row * before_stride[s] + start), lanes, mask)
                y = _load_fp32(after[s] + (row * after_stride[s] + start), lanes, mask)
                if len(anchor) > 0:
                    a = _load_fp32(anchor[s] + (row * anchor_stride[s] + start), lanes, mask)
                    differences += tl.abs((y - x) - a)
                    magnitudes += tl.abs(a)
                else:
                    differences += tl.abs(y - x)
                    magnitudes += tl.abs(x)
            difference = tl.sum(differences)
            magnitude = tl.sum(magnitudes)
            output = s * groups + group
            _finish_group(difference, magnitude, output, position, programs, partials, tickets, sums, FINAL_BLOCK)


@triton.jit(do_not_specialize=["slot", "slots"])
def _residual_push_kernel(
    before,
    after,
    ring,
    row_numel,
    before_stride,
    after_stride,
    ring_stride,
    slot_stride,
    rows,
    slot,
    slots,
    DEVICE_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ring[slot] = after - before, computed in fp32 and rounded once; a slot outside [0, slots) writes nothing.

    The grid is (tiles of the largest stream, streams).
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    index = tl.load(slot).to(tl.int64) if DEVICE_SLOT else tl.cast(slot, tl.int64)
    for s in tl.static_range(len(before)):
        tiles = tl.cdiv(row_numel[s], BLOCK)
        if (tl.program_id(1) == s) & (program < rows[s] * tiles):
            row = (program // tiles).to(tl.int64)
            start = (program % tiles).to(tl.int64) * BLOCK
            mask = lanes < row_numel[s] - start
            x = _load_fp32(before[s] + (row * before_stride[s] + start), lanes, mask)
            y = _load_fp32(after[s] + (row * after_stride[s] + start), lanes, mask)
            target = ring[s] + (index * slot_stride[s] + row * ring_stride[s] + start) + lanes
            inside = (index >= 0) & (index < slots)
            tl.store(target, (y - x).to(ring[s].dtype.element_ty), mask=mask & inside)


@triton.jit
def load_tokens(tensor, row, column, mask, rows_per_sample, sample_stride, columns):
    """Elements [ROWS, COLUMNS] in fp32; rows of `columns` are adjacent within a sample. Zeros outside of the mask."""
    start = (row // rows_per_sample).to(tl.int64) * sample_stride + (row % rows_per_sample).to(tl.int64) * columns
    return _load_fp32(tensor + start[:, None], column, mask)


@triton.jit(do_not_specialize=["slot", "slots"])
def _residual_push_float8_kernel(
    before,
    after,
    ring,
    scales,
    rows,
    columns,
    rows_per_sample,
    before_stride,
    after_stride,
    ring_stride,
    scales_stride,
    slot,
    slots,
    DEVICE_SLOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ring[slot], scales[slot] = after - before in E4M3, from fp32; a slot outside [0, slots) writes nothing.

    Stream s has `rows[s]` rows of `columns[s]`; strides of inputs are between samples, those of ring and scales between
    slots. A program takes ROWS rows, COLUMNS of each at once: a first pass finds their scales, and what the second one
    reads again is in L1 still. The grid is (tiles of the most rows, streams).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, COLUMNS)[None, :]
    index = tl.load(slot).to(tl.int64) if DEVICE_SLOT else tl.cast(slot, tl.int64)
    for s in tl.static_range(len(before)):
        if (tl.program_id(1) == s) & (tl.program_id(0) * ROWS < rows[s]):
            inside = row < rows[s]
            magnitudes = tl.zeros([ROWS], tl.float32)
            for start in range(0, columns[s], COLUMNS):
                column = start + lanes
                mask = inside[:, None] & (column < columns[s])
                x = load_tokens(before[s], row, column, mask, rows_per_sample[s], before_stride[s], columns[s])
                y = load_tokens(after[s], row, column, mask, rows_per_sample[s], after_stride[s], columns[s])
                magnitudes = tl.maximum(magnitudes, row_magnitudes(y - x))
            scale = row_scales(magnitudes)
            inside = inside & (index >= 0) & (index < slots)
            tl.store(scales[s] + index * scales_stride[s] + row, scale, mask=inside)
            target = ring[s] + index * ring_stride[s] + row.to(tl.int64)[:, None] * columns[s]
            for start in range(0, columns[s], COLUMNS):
                column = start + lanes
                mask = inside[:, None] & (column < columns[s])
                x = load_tokens(before[s], row, column, mask, rows_per_sample[s], before_stride[s], columns[s])
                y = load_tokens(after[s], row, column, mask, rows_per_sample[s], after_stride[s], columns[s])
                tl.store(target + column, row_codes(y - x, scale), mask=mask)


def residual_l1(
    before: Sequence[Tensor], after: Sequence[Tensor], anchor: Sequence[Tensor], per_sample: bool = False
) -> Tensor:
    """Per stream [sum |(after - before) - anchor|, sum |anchor|]: float32 [S, 2], or [S, B, 2] with `per_sample`."""
    return _reduce(list(zip(before, after, anchor, strict=True)), per_sample)


def l1(previous: Sequence[Tensor], current: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """Per stream [sum |previous - current|, sum |previous|]: float32 [S, 2], or [S, B, 2] with `per_sample`."""
    return _reduce(list(zip(previous, current, strict=True)), per_sample)


def residual_push(
    before: Sequence[Tensor], after: Sequence[Tensor], ring: Sequence[Tensor], slot: int | Tensor
) -> None:
    """ring[s][slot] = after[s] - before[s] for every stream; a tensor slot is read by the kernel, never by the host.

    The slots of a ring must be contiguous, as it is written in place.
    """
    slots = ring[0].shape[0]
    streams = []  # with the distance between the ring's slots
    for b, a, r in zip(before, after, ring, strict=True):
        if b.numel() > 0:
            streams.append((row_view((b, a, r[0])), r.stride(0)))
    for i in range(0, len(streams), MAX_STREAMS_PER_LAUNCH):
        _launch_push(streams[i : i + MAX_STREAMS_PER_LAUNCH], slot, slots)


def residual_push_float8(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    ring: Sequence[Tensor],
    slot: int | Tensor,
    scales: Sequence[Tensor],
) -> None:
    """ring[s][slot], scales[s][slot] = after[s] - before[s] in E4M3, for every stream; slots must be contiguous."""
    streams = []
    for b, a, r, c in zip(before, after, ring, scales, strict=True):
        view = token_view((b, a))
        if view.rows > 0:
            streams.append((view, r, c))
    for i in range(0, len(streams), MAX_STREAMS_PER_LAUNCH):
        _launch_push_float8(streams[i : i + MAX_STREAMS_PER_LAUNCH], slot)


def _reduce(streams: list[tuple[Tensor, ...]], per_sample: bool) -> Tensor:
    sample = streams[0][0]
    groups = sample.shape[0] if per_sample and sample.dim() else 1
    shape = (len(streams), groups, 2) if per_sample else (len(streams), 2)
    sums = torch.empty(shape, dtype=torch.float32, device=sample.device)
    if groups > 0:
        for i in range(0, len(streams), MAX_STREAMS_PER_LAUNCH):
            chunk = slice(i, i + MAX_STREAMS_PER_LAUNCH)
            _launch_l1([row_view(tensors, split=per_sample) for tensors in streams[chunk]], groups, sums[chunk])
    return sums


def _launch_l1(views: list[RowView], groups: int, sums: Tensor) -> None:
    block = REDUCE_BLOCK[max(view.element_size for view in views)]
    rows = tuple(view.rows // groups for view in views)
    tiles = max(count * view.tiles(block) for count, view in zip(rows, views, strict=True))
    programs = programs_per_group(tiles, groups, sums.device)
    partials = torch.empty((len(views), groups, programs, 2), dtype=torch.float32, device=sums.device)
    tensors = list(zip(*(view.tensors for view in views), strict=True))
    strides = list(zip(*(view.strides for view in views), strict=True))
    no_anchor: list[tuple[int, ...]] = [()] if len(tensors) == 2 else []
    with on_device_of(sums):
        _l1_kernel[(groups * programs, len(views))](
            *tensors,
            *no_anchor,
            tuple(view.row_numel for view in views),
            *strides,
            *no_anchor,
            rows,
            programs,
            groups,
            partials,
            tickets_for(sums.device, len(views) * groups),
            sums,
            ONE_ROW=all(count == 1 for count in rows),
            BLOCK=block,
            FINAL_BLOCK=FINAL_BLOCK,
            num_warps=NUM_WARPS,
        )


def _launch_push(streams: list[tuple[RowView, int]], slot: int | Tensor, slots: int) -> None:
    views = [view for view, _ in streams]
    block = PUSH_BLOCK[max(view.element_size for view in views)]
    rows = tuple(view.rows for view in views)
    grid = (max(view.rows * view.tiles(block) for view in views), len(views))
    with on_device_of(views[0].tensors[0]):
        _residual_push_kernel[grid](
            *zip(*(view.tensors for view in views), strict=True),
            tuple(view.row_numel for view in views),
            *zip(*(view.strides for view in views), strict=True),
            tuple(slot_stride for _, slot_stride in streams),
            rows,
            slot,
            slots,
            DEVICE_SLOT=isinstance(slot, Tensor),
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def _launch_push_float8(streams: list[tuple[TokenView, Tensor, Tensor]], slot: int | Tensor) -> None:
    views, ring, scales = zip(*streams, strict=True)
    rows, columns = token_tile(views)
    grid = (max(triton.cdiv(view.rows, rows) for view in views), len(views))
    with on_device_of(ring[0]):
        _residual_push_float8_kernel[grid](
            *zip(*(view.tensors for view in views), strict=True),
            ring,
            scales,
            tuple(view.rows for view in views),
            tuple(view.columns for view in views),
            tuple(view.rows_per_sample for view in views),
            *zip(*(view.strides for view in views), strict=True),
            tuple(r.stride(0) for r in ring),
            tuple(c.stride(0) for c in scales),
            slot,
            ring[0].shape[0],
            DEVICE_SLOT=isinstance(slot, Tensor),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )
