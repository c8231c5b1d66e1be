"""Triton kernel for the inner products between ring slots: `ring_gram`, `ring_gram_float8`.

The launch functions carry the operators' names and take checked tensors of any strides. All streams go out in one
launch, up to four of them; they may differ in shape and dtype. Sums are made in two stages inside one kernel, joined by
an integer ticket, as in residual/kernel.py: no float is added atomically, and equal inputs give equal bits.
"""

# ruff: noqa: RUF005 (Triton joins tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def, assignment"
# Triton reads the annotations of its functions as its own types.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachedit_kernels.launch import (
    MAX_STREAMS_PER_LAUNCH,
    RowView,
    is_laid_out_in_rows,
    on_device_of,
    programs_per_group,
    row_view,
    tickets_for,
)

NUM_WARPS = 4
FINAL_BLOCK = 256  # partials that the last program of a group reads at once
# Elements of each slot that a program takes at once, by the most slots that it serves. A thread holds one accumulator
# per element and pair of slots: 8, 4, 2 and 1 elements keep them below 85 registers up to 6 slots, 136 in all at 16.
BLOCK = {3: 1024, 6: 512, 8: 256, 16: 128}


@triton.jit(do_not_specialize=["programs", "groups"])
def _ring_gram_kernel(
    ring,
    offsets,
    scales,
    scale_offsets,
    columns,
    row_numel,
    row_stride,
    rows,
    programs,
    groups,
    partials,
    tickets,
    grams,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FINAL_BLOCK: tl.constexpr,
):
    """grams[s, g, i, j] = sum over group g of ring[s][slot i] * ring[s][slot j].

    Stream s has `groups` groups of `rows[s]` rows of `row_numel[s]` elements; slot i begins `offsets[s][i]` elements
    behind `ring[s]`. With `scales`, the ring is in E4M3: every `columns[s]` elements share one of `scales[s]`, whose
    slot i begins at `scale_offsets[s][i]`. Products and a program's sums are in fp32, the programs' sums are added in
    fp64 in the order of their index, by whichever of a group's `programs` finishes last. The grid is (groups *
    programs, streams).
    """
    group = tl.program_id(0) // programs
    position = tl.program_id(0) % programs
    lanes = tl.arange(0, BLOCK)
    PAIRS: tl.constexpr = SLOTS * (SLOTS + 1) // 2
    output = (tl.program_id(1) * groups + group).to(tl.int64)
    first = partials + output * PAIRS * programs + position
    for s in tl.static_range(len(ring)):
        if tl.program_id(1) == s:
            tiles = tl.cdiv(row_numel[s], BLOCK)
            sums = ()
            for _ in tl.static_range(PAIRS):
                sums = sums + (tl.zeros([BLOCK], tl.float32),)
            for tile in range(position, rows[s] * tiles, programs):
                row = (group * rows[s] + tile // tiles).to(tl.int64)
                start = (tile % tiles).to(tl.int64) * BLOCK
                mask = lanes < row_numel[s] - start
                values = ()
                for i in tl.static_range(SLOTS):
                    slot = ring[s] + (tl.cast(offsets[s][i], tl.int64) + row * row_stride[s] + start)
                    value = tl.load(slot + lanes, mask=mask, other=0.0).to(tl.float32)
                    if len(scales) > 0:
                        shared = scales[s] + tl.cast(scale_offsets[s][i], tl.int64)
                        place = (row * row_numel[s] + start + lanes) // columns[s]
                        value *= tl.load(shared + place, mask=mask, other=0.0)
                    values = values + (value,)
                added = ()
                for i in tl.static_range(SLOTS):
                    for j in tl.static_range(i + 1):
                        added = added + (sums[i * (i + 1) // 2 + j] + values[i] * values[j],)
                sums = added
            for pair in tl.static_range(PAIRS):
                tl.store(first + pair * programs, tl.sum(sums[pair]))
    # As in residual/kernel.py: the barrier orders the stores before the ticket, whose release publishes them.
    tl.debug_barrier()
    arrived = tl.atomic_add(tickets + output, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
        places = tl.arange(0, FINAL_BLOCK)
        first = partials + output * PAIRS * programs
        gram = grams + output * SLOTS * SLOTS
        for i in range(SLOTS):
            for j in range(i + 1):
                total = tl.zeros([FINAL_BLOCK], tl.float64)
                for begin in range(0, programs, FINAL_BLOCK):
                    mask = places < programs - begin
                    # .cg reads L2, where the other programs' stores are; L1 may hold older lines.
                    part = tl.load(first + begin + places, mask=mask, other=0.0, cache_modifier=".cg")
                    total += part.to(tl.float64)
                product = tl.sum(total).to(tl.float32)
                tl.store(gram + i * SLOTS + j, product)
                tl.store(gram + j * SLOTS + i, product)
                first += programs
        tl.store(tickets + output, 0)  # ready for the next launch


def ring_gram(ring: Sequence[Tensor], slots: Sequence[int] | None = None, per_sample: bool = False) -> Tensor:
    """sum ring[s][slots[i]] * ring[s][slots[j]] for every stream: float32 [S, k, k], [S, B, k, k] with `per_sample`."""
    return _ring_gram(ring, slots, per_sample, [None] * len(ring))


def ring_gram_float8(
    ring: Sequence[Tensor], slots: Sequence[int] | None, per_sample: bool, scales: Sequence[Tensor]
) -> Tensor:
    """The same of rings in E4M3, whose slots and those of their scales are contiguous."""
    return _ring_gram(ring, slots, per_sample, scales)


def _ring_gram(
    ring: Sequence[Tensor], slots: Sequence[int] | None, per_sample: bool, scales: Sequence[Tensor | None]
) -> Tensor:
    chosen = list(range(ring[0].shape[0])) if slots is None else list(slots)
    groups = ring[0].shape[1] if per_sample else 1
    samples = (groups,) if per_sample else ()
    grams = torch.zeros((len(ring), *samples, len(chosen), len(chosen)), dtype=torch.float32, device=ring[0].device)
    if chosen and groups > 0:
        for i in range(0, len(ring), MAX_STREAMS_PER_LAUNCH):
            chunk = slice(i, i + MAX_STREAMS_PER_LAUNCH)
            streams = [_stream(r, c, chosen, per_sample) for r, c in zip(ring[chunk], scales[chunk], strict=True)]
            _launch(streams, groups, grams[chunk])
    return grams


class _Stream(NamedTuple):
    view: RowView  # of the first slot
    offsets: tuple[int, ...]  # of the chosen slots from the first one, in elements
    scales: Tensor | None
    scale_offsets: tuple[int, ...]
    columns: int  # elements that share a scale


def _stream(ring: Tensor, scales: Tensor | None, slots: list[int], per_sample: bool) -> _Stream:
    if not is_laid_out_in_rows(ring[0]):
        ring = torch.stack([ring[slot] for slot in slots])
        slots = list(range(len(slots)))
    view = row_view((ring[0],), split=per_sample)
    scale_offsets = () if scales is None else tuple(slot * scales.stride(0) for slot in slots)
    offsets = tuple(slot * ring.stride(0) for slot in slots)
    return _Stream(view, offsets, scales, scale_offsets, max(1, ring.shape[-1]))


def _launch(streams: list[_Stream], groups: int, grams: Tensor) -> None:
    views = [stream.view for stream in streams]
    slots = grams.shape[-1]
    block = next(size for most, size in BLOCK.items() if slots <= most)
    rows = tuple(view.rows // groups for view in views)
    tiles = max(count * view.tiles(block) for count, view in zip(rows, views, strict=True))
    programs = programs_per_group(tiles, groups, grams.device)
    shape = (len(views), groups, slots * (slots + 1) // 2, programs)
    partials = torch.empty(shape, dtype=torch.float32, device=grams.device)
    with on_device_of(grams):
        _ring_gram_kernel[(groups * programs, len(views))](
            tuple(view.tensors[0] for view in views),
            tuple(stream.offsets for stream in streams),
            tuple(stream.scales for stream in streams if stream.scales is not None),
            tuple(stream.scale_offsets for stream in streams if stream.scales is not None),
            tuple(stream.columns for stream in streams if stream.scales is not None),
            tuple(view.row_numel for view in views),
            tuple(view.strides[0] for view in views),
            rows,
            programs,
            groups,
            partials,
            tickets_for(grams.device, len(views) * groups),
            grams,
            SLOTS=slots,
            BLOCK=block,
            FINAL_BLOCK=FINAL_BLOCK,
            num_warps=NUM_WARPS,
        )
