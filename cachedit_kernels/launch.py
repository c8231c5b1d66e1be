"""What the Triton launch functions share: tensors seen as rows, grids of deterministic reductions, ticket counters.

Imports torch only, so that it can be read and tested without Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STREAMS_PER_LAUNCH = 4  # a kernel holds one body per stream; more streams take further launches
PROGRAMS_PER_SM = 8  # of a reduction: as many programs of four warps as an SM's registers hold at once
MULTIPROCESSORS_WITHOUT_GPU = 2  # small, as the interpreter runs programs one after the other


class RowView(NamedTuple):
    """Tensors of one shape and dtype, as `rows` rows of `row_numel` adjacent elements; strides are between rows."""

    tensors: tuple[Tensor, ...]
    rows: int
    row_numel: int
    strides: tuple[int, ...]

    @property
    def element_size(self) -> int:
        return self.tensors[0].element_size()

    def tiles(self, block: int) -> int:
        """How many blocks of elements a row is cut into."""
        return -(-self.row_numel // block)


def row_view(tensors: Sequence[Tensor], split: bool = False) -> RowView:
    """The tensors as one row where all are contiguous, else as one row per sample (also where `split` asks for it).

    Tensors that are contiguous within each sample, such as `x[:, :tokens]`, are taken as they lie; others are copied,
    so a tensor that is written to must be known to be laid out in rows.
    """
    numel = tensors[0].numel()
    if not split and all([tensor.is_contiguous() for tensor in tensors]):  # a list costs less than a generator here
        return RowView(tuple(tensors), 1, numel, (0,) * len(tensors))
    shape = tensors[0].shape
    samples = shape[0] if shape else 1
    if samples == 0:
        return RowView(tuple(tensors), 0, 0, (0,) * len(tensors))
    # .contiguous() keeps odd strides of slices with one sample; a clone with an explicit format does not.
    ready = tuple(
        tensor if is_laid_out_in_rows(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    )
    if samples == 1:  # a stride that is never used must not choose another specialisation
        return RowView(ready, 1, numel, (0,) * len(ready))
    return RowView(ready, samples, numel // samples, tuple(tensor.stride(0) for tensor in ready))


class TokenView(NamedTuple):
    """Tensors of one shape and dtype, as `rows` rows of `columns`: the last dimension, which shares a scale.

    Rows are adjacent within a sample of `rows_per_sample`; strides are between samples.
    """

    tensors: tuple[Tensor, ...]
    rows: int
    columns: int
    rows_per_sample: int
    strides: tuple[int, ...]


def token_view(tensors: Sequence[Tensor], split: bool = False) -> TokenView:
    """The tensors by their last dimension; samples and copies are those of `row_view`."""
    view = row_view(tensors, split)
    rows = math.prod(tensors[0].shape[:-1])
    return TokenView(view.tensors, rows, tensors[0].shape[-1], max(1, rows // max(1, view.rows)), view.strides)


TILE = 2048  # elements: 16 to a thread of four warps, whose codes are one 16-byte access
MAX_COLUMNS = 1024


def token_tile(views: Sequence[TokenView]) -> tuple[int, int]:
    """How many rows a program takes, and how many columns of them at once; powers of 2."""
    widest = max(view.columns for view in views)
    columns = min(1 << max(0, widest - 1).bit_length(), MAX_COLUMNS)
    return TILE // columns, columns


def is_laid_out_in_rows(tensor: Tensor) -> bool:
    """Whether each sample (index of the first dimension) is contiguous."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def leading_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of [B, L, H(, D)] but for D's; 0 where one is never used, so as not to choose a specialisation."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True))


def with_adjacent_columns(tensor: Tensor) -> Tensor:
    """The tensor as it lies where elements of the last dimension are neighbours, else a contiguous copy."""
    adjacent = tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    return tensor if adjacent else tensor.clone(memory_format=torch.contiguous_format)


def programs_per_group(tiles: int, groups: int, device: torch.device) -> int:
    """How many programs share a group that is added up, given the tiles of the largest group; at least one.

    A few programs per multiprocessor in all: enough loads in flight, few partials to add at the end. The result depends
    on shapes and the device model alone, as equal inputs must be added up in equal order.
    """
    return max(1, min(tiles, PROGRAMS_PER_SM * multiprocessors(device) // groups))


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS_WITHOUT_GPU
    return _multiprocessors(device.index)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one for a launch; free where it already is, or where there is no GPU."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def tickets_for(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros that kernels on the current stream may count in, if they leave zeros behind.

    One buffer per stream, as launches on one stream never overlap. A captured graph may be replayed on any stream
    beside eager launches, so it gets zeros of its own, made anew by every replay.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    tickets = _tickets.get((device, stream))
    if tickets is None or tickets.numel() < count:
        with torch.inference_mode(False):
            tickets = torch.zeros(max(count, 256), dtype=torch.int32, device=device)
        _tickets[device, stream] = tickets
    return tickets
