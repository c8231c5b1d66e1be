"""How a group's exchanges travel, and why: by a collective, or by writing into each other's memory (symmetric.py).

Chosen once per group and device, on its first exchange, by all ranks together. CACHEDIT_KERNELS_TRANSPORT=collective
or =symmetric forces one; it is read at that moment, and must be the same on all ranks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from cachedit_kernels.ulysses import symmetric
from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, even_splits

VARIABLE = "CACHEDIT_KERNELS_TRANSPORT"
TRANSPORTS = ("collective", "symmetric")


class Transport(NamedTuple):
    """`name` is "collective" or "symmetric"."""

    name: str
    reason: str


def transport(group: dist.ProcessGroup | None = None, device: torch.device | str | None = None) -> Transport:
    """What carries a group's exchanges of tensors on a device, and why: `transport(group).reason`.

    All ranks of the group must call it, if there was no exchange before: then it is a collective call, and tries the
    choice out.

    Args:
        group: all ranks by default.
        device: the current GPU by default, where there is one and the group serves it; else the CPU.

    Raises:
        RuntimeError: CACHEDIT_KERNELS_TRANSPORT is none of both, differs between ranks, or asks for what can't be.
    """
    group = dist.distributed_c10d._get_default_group() if group is None else group
    if device is None:
        device = "cuda" if torch.cuda.is_available() and "cuda" in {d.type for d in group._device_types} else "cpu"
    found: Transport = chosen(group.group_name, torch.device(device))
    return found


def chosen(group_name: str, device: torch.device) -> Transport:
    """The same by the group's name; a constant to `torch.compile`."""
    group = symmetric.group_of(group_name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    known = _chosen.get((group_name, device))
    if known is None or known[0] is not group:  # names come again after destroy_process_group
        known = _chosen[group_name, device] = group, _choose(group, device)
    return known[1]


# What torch.compiler.assume_constant_result does, without importing dynamo with the package.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]
_chosen: dict[tuple[str, torch.device], tuple[dist.ProcessGroup, Transport]] = {}


class Facts(NamedTuple):
    """What a rank knows of itself."""

    forced: str | None
    host: str
    device: int | None
    reachable: tuple[int, ...]  # devices of this host whose memory this one can address
    missing: str | None  # what symmetric memory lacks here


def _choose(group: dist.ProcessGroup, device: torch.device) -> Transport:
    forced = os.environ.get(VARIABLE)
    if forced is None and device.type == "cpu":
        return Transport("collective", "tensors on CPU go over the group's backend")
    facts: list[Facts] = _gathered(_facts(forced, device), group)
    settings = [fact.forced for fact in facts]
    if len(set(settings)) > 1:
        raise RuntimeError(f"{VARIABLE} must be the same on all ranks, got {settings}")
    if forced not in (None, *TRANSPORTS):
        raise RuntimeError(f"{VARIABLE} must be one of {', '.join(TRANSPORTS)}, got {forced!r}")
    because = f"forced by {VARIABLE}"
    if forced == "collective":
        return Transport("collective", because)
    obstacle = obstacle_between(facts) or _trial(group, device)
    if obstacle is None:
        return Transport("symmetric", because if forced else "all ranks can address each other's memory")
    if forced == "symmetric":
        raise RuntimeError(f"{VARIABLE}=symmetric, but {obstacle}")
    return Transport("collective", obstacle)


def _facts(forced: str | None, device: torch.device) -> Facts:
    host = socket.gethostname()
    if device.type == "cpu":
        return Facts(forced, host, None, (), None)
    try:
        import torch.distributed._symmetric_memory
        import triton  # noqa: F401

        missing = None
    except ImportError as error:
        missing = str(error)
    reachable = (
        other
        for other in range(torch.cuda.device_count())
        if other == device.index or torch.cuda.can_device_access_peer(device, other)
    )
    return Facts(forced, host, device.index, tuple(reachable), missing)


def obstacle_between(facts: Sequence[Facts]) -> str | None:
    """Why these ranks can't write into each other's memory, in words; None where they can."""
    for rank, fact in enumerate(facts):
        if fact.missing is not None:
            return f"rank {rank} lacks it: {fact.missing}"
    hosts = sorted({fact.host for fact in facts})
    if len(hosts) > 1:
        return f"its ranks are on several hosts: {', '.join(hosts)}"
    for rank, fact in enumerate(facts):
        if fact.device is None:
            continue
        for other, its in enumerate(facts):
            if other != rank and its.device == fact.device:
                return f"ranks {rank} and {other} both call their device {fact.device}, so that none knows the other's"
            if its.device not in fact.reachable:
                return f"device {fact.device} can't address the memory of device {its.device}"
    return None


def _trial(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Exchanges something small, of which all ranks know what must arrive; what went wrong on which rank."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths, heads, float8 = (3,) * world, even_splits(world + 1, world), (True, False)
    numbers = torch.arange(3 * world * (world + 1), device=device) % 251 + 1  # they come back from E4M3 as they are
    whole = numbers.view(1, 3 * world, world + 1, 1).expand(-1, -1, -1, 32).bfloat16()
    mine, want = whole.split(3, dim=SEQUENCE)[rank], whole.split(heads, dim=HEADS)[rank]
    obstacle = None
    try:
        ticket = symmetric.send([mine, mine], heads, HEADS, lengths, SEQUENCE, float8, group.group_name)
        got = symmetric.receive(
            ticket, want.shape, lengths, SEQUENCE, want.dtype, float8, True, device, group.group_name
        )
        if not all(torch.equal(tensor, want) for tensor in got):
            obstacle = "something else than what was sent has arrived"
    except Exception as error:  # of any kind: whatever fails here, the collective works
        obstacle = str(error)
    failures = [f"rank {i}: {text}" for i, text in enumerate(_gathered(obstacle, group)) if text is not None]
    return f"a trial has failed on {'; '.join(failures)}" if failures else None


def _gathered(mine: object, group: dist.ProcessGroup) -> list:  # type: ignore[type-arg]
    """Every rank's, by rank."""
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone
