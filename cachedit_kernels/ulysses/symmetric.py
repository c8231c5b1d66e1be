"""Exchanges by writing: ranks that can address each other's memory pack straight into each other's buffers.

Every rank has the same slots. A slot is a receive buffer on each rank, mapped by all of them, and takes one exchange at
a time. A rank's part of an exchange is three kernels:

    send     1  pack: block p is written where rank p's unpacking will look for what comes from this rank
    receive  2  a barrier: from here on, what all ranks have packed before it is there
             3  unpack: this rank's own buffer, into new tensors; the slot is free

Nothing is agreed on while it runs: sizes follow from shapes, and slots from the order of calls, which is the same on
all ranks (as it is for collectives). A free slot is taken again only after one more barrier, of whichever exchange: all
ranks enter that one after they have read the slot, so a fast rank does not overwrite what a slow one still reads. Hence
two slots serve exchanges that follow one another, and one more for each further exchange that is under way. They are
allocated when they are first needed, which is at the same call on all ranks.

On GPUs the kernels run on the current stream, which must be the same one for both calls, and the host does not wait. In
a captured graph, which can be replayed at any time, a barrier in front of packing and one behind unpacking stand in for
the count of barriers. On CPU the barrier is the group's, and slots are files that all ranks map: that is for tests.

The GPU path has not been tried on hardware with several GPUs yet.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cachedit_kernels import _checks
from cachedit_kernels._library import LIBRARY, define
from cachedit_kernels.ulysses.layout import buffer_bytes, layout
from cachedit_kernels.ulysses.op import ulysses_pack, ulysses_unpack_fake

GRANULARITY = 2 << 20  # bytes; slots are multiples of it, so that lengths that differ a little share them
TIMEOUT_MS = 600_000  # of a barrier on GPUs, as NCCL's collectives have by default; gloo's is the group's


@dataclass
class Slot:
    """A receive buffer of each rank, as this process sees it."""

    buffers: list[Tensor]  # uint8 [nbytes], by rank
    barrier: Callable[[], None]
    in_use: bool = False
    freed: int = -1  # how many barriers this rank had passed when it last unpacked

    @property
    def nbytes(self) -> int:
        return self.buffers[0].numel()


@dataclass
class Slots:
    """All slots of a group on a device, by the number that is their ticket."""

    group: dist.ProcessGroup
    device: torch.device
    slots: dict[int, Slot] = field(default_factory=dict)
    allocated: int = 0
    barriers: int = 0

    def take(self, nbytes: int) -> int:
        """The number of a slot that nobody reads or writes any more; the same on all ranks."""
        for number, slot in self.slots.items():
            if slot.nbytes >= nbytes and not slot.in_use and slot.freed < self.barriers:
                slot.in_use = True
                return number
        self.slots = {n: slot for n, slot in self.slots.items() if slot.in_use or slot.nbytes >= nbytes}  # not outgrown
        number, self.allocated = self.allocated, self.allocated + 1
        rounded = max(1, -(-nbytes // GRANULARITY)) * GRANULARITY
        allocate = _allocate_on_gpu if self.device.type == "cuda" else _allocate_in_files
        with torch.inference_mode(False):  # the slot outlives this call
            self.slots[number] = allocate(rounded, self.device, self.group)
        self.slots[number].in_use = True
        return number


def _allocate_on_gpu(nbytes: int, device: torch.device, group: dist.ProcessGroup) -> Slot:
    import torch.distributed._symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(own, group.group_name)
    buffers = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(dist.get_world_size(group))]
    buffers[dist.get_rank(group)] = own
    return Slot(buffers, lambda: handle.barrier(channel=0, timeout_ms=TIMEOUT_MS))


def _allocate_in_files(nbytes: int, device: torch.device, group: dist.ProcessGroup) -> Slot:
    rank, first = dist.get_rank(group), dist.get_global_rank(group, 0)
    folder = [tempfile.mkdtemp(prefix="cachedit-") if rank == 0 else None]
    dist.broadcast_object_list(folder, src=first, group=group)
    paths = [os.path.join(str(folder[0]), str(peer)) for peer in range(dist.get_world_size(group))]
    torch.from_file(paths[rank], shared=True, size=nbytes, dtype=torch.uint8)  # makes the file
    dist.barrier(group)
    buffers = [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in paths]
    dist.barrier(group)
    os.remove(paths[rank])  # what is mapped stays
    dist.barrier(group)
    if rank == 0:
        os.rmdir(str(folder[0]))
    return Slot(buffers, lambda: dist.barrier(group))


def group_of(name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d
    group: dist.ProcessGroup = c10d._resolve_process_group(name)
    return group


_slots: dict[tuple[str, torch.device], Slots] = {}


def _slots_of(group_name: str, device: torch.device) -> Slots:
    group = group_of(group_name)
    slots = _slots.get((group_name, device))
    if slots is None or slots.group is not group:  # names come again after destroy_process_group
        slots = _slots[group_name, device] = Slots(group, device)
    return slots


@functools.lru_cache(maxsize=1024)
def _places(
    shape: tuple[int, ...],
    scatter: tuple[int, tuple[int, ...]],
    gather: tuple[int, tuple[int, ...]],
    element_size: int,
    float8: tuple[bool, ...],
    rank: int,
) -> tuple[tuple[int, ...], int]:
    """Where rank's block begins in each peer's buffer, and the bytes of the largest buffer."""
    received = []
    for size in scatter[1]:
        whole = list(shape)
        whole[scatter[0]], whole[gather[0]] = size, sum(gather[1])
        received.append(layout(whole, gather[1], gather[0], element_size, float8))
    return tuple(blocks[rank].offset for blocks in received), max(map(buffer_bytes, received))


def _send(
    tensors: Sequence[Tensor],
    scatter_splits: Sequence[int],
    scatter_dim: int,
    gather_splits: Sequence[int],
    gather_dim: int,
    float8: Sequence[bool],
    group_name: str,
) -> Tensor:
    _checks.ulysses_pack(tensors, scatter_splits, scatter_dim, float8)
    like = tensors[0]
    slots = _slots_of(group_name, like.device)
    scatter, gather = (scatter_dim, tuple(scatter_splits)), (gather_dim, tuple(gather_splits))
    rank = dist.get_rank(slots.group)
    offsets, nbytes = _places(tuple(like.shape), scatter, gather, like.element_size(), tuple(float8), rank)
    number = slots.take(nbytes)
    _barrier_if_captured(slots.slots[number], like.device)
    _pack_into(tensors, scatter_splits, scatter_dim, float8, slots.slots[number].buffers, offsets)
    return torch.tensor([number])


def _pack_into(
    tensors: Sequence[Tensor],
    splits: Sequence[int],
    dim: int,
    float8: Sequence[bool],
    buffers: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    if tensors[0].is_cuda:
        from cachedit_kernels.ulysses.kernel import ulysses_pack_into

        ulysses_pack_into(tensors, splits, dim, float8, buffers, offsets)
        return
    packed = ulysses_pack(tensors, splits, dim, float8)
    blocks = layout(tensors[0].shape, splits, dim, tensors[0].element_size(), float8)
    for block, buffer, offset in zip(blocks, buffers, offsets, strict=True):
        buffer[offset : offset + block.nbytes] = packed[block.offset : block.offset + block.nbytes]


def _receive(
    ticket: Tensor,
    shape: Sequence[int],
    splits: Sequence[int],
    gather_dim: int,
    dtype: torch.dtype,
    float8: Sequence[bool],
    dequantize: bool,
    device: torch.device,
    group_name: str,
) -> list[Tensor]:
    slots = _slots_of(group_name, device)
    slot = slots.slots.get(int(ticket))
    if slot is None or not slot.in_use:
        raise RuntimeError("symmetric_receive: ticket must be of an exchange under way, got one that has been received")
    slot.barrier()
    slots.barriers += 1
    nbytes = buffer_bytes(layout(shape, splits, gather_dim, dtype.itemsize, float8))
    own = slot.buffers[dist.get_rank(slots.group)][:nbytes]
    arrays: list[Tensor] = torch.ops.cachedit.ulysses_unpack(own, shape, splits, gather_dim, dtype, float8, dequantize)
    _barrier_if_captured(slot, device)
    slot.in_use, slot.freed = False, slots.barriers
    return arrays


def _barrier_if_captured(slot: Slot, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        slot.barrier()


def _send_fake(tensors: Sequence[Tensor], *args: Any) -> Tensor:
    return tensors[0].new_empty(1, dtype=torch.int64, device="cpu")


def _receive_fake(
    ticket: Tensor,
    shape: Sequence[int],
    splits: Sequence[int],
    gather_dim: int,
    dtype: torch.dtype,
    float8: Sequence[bool],
    dequantize: bool,
    device: torch.device,
    group_name: str,
) -> list[Tensor]:
    nbytes = buffer_bytes(layout(shape, splits, gather_dim, dtype.itemsize, float8))
    buffer = ticket.new_empty(nbytes, dtype=torch.uint8, device=device)
    return ulysses_unpack_fake(buffer, list(shape), list(splits), gather_dim, dtype, list(float8), dequantize)


# Operators, so that `torch.compile` takes them as they are. The ticket, the number of the slot, puts them in order.
send = define(
    "symmetric_send(Tensor[] tensors, SymInt[] scatter_splits, int scatter_dim, SymInt[] gather_splits, "
    "int gather_dim, bool[] float8, str group) -> Tensor",
    _send_fake,
)
receive = define(
    "symmetric_receive(Tensor ticket, SymInt[] shape, SymInt[] splits, int gather_dim, ScalarType dtype, "
    "bool[] float8, bool dequantize, Device device, str group) -> Tensor[]",
    _receive_fake,
)
LIBRARY.impl("symmetric_send", _send, "CompositeExplicitAutograd")
LIBRARY.impl("symmetric_receive", _receive, "CompositeExplicitAutograd")
