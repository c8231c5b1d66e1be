"""The process groups of one parallel transformer, and what ranks agree on before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .config import Sizes

__all__ = ["Groups", "agree", "all_gather"]

# all_gather(output, input, group): its name in newer versions of torch, and in older ones.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

T = TypeVar("T")

# Groups within a group, by their ranks, as long as that one lives: one made anew would find what the last one of the
# same ranks left in the store.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()


class Groups:
    """Groups along each dimension; None where a dimension has one rank.

    They are made of the members alone: other ranks of the world neither take part nor wait.

    Args:
        sizes: Their product is the size of ``group``.
        group: All ranks that take part.
        device_type: ``"cuda"``, ``"cpu"``, ...
    """

    def __init__(self, sizes: Sizes, group: dist.ProcessGroup, device_type: str):
        self.sizes = sizes
        self.group = group
        ranks = dist.get_process_group_ranks(group)
        me = dist.get_rank(group)
        u, r = me // sizes.tp % sizes.ulysses, me // sizes.tp // sizes.ulysses
        t = me % sizes.tp

        def number(ring: int, ulysses: int, tp: int) -> int:
            return ranks[(ring * sizes.ulysses + ulysses) * sizes.tp + tp]

        # The same order on all ranks, dimension after dimension, so that nobody waits for somebody who waits.
        self.ring = self._group([number(i, u, t) for i in range(sizes.ring)])
        self.ulysses = self._group([number(r, i, t) for i in range(sizes.ulysses)])
        self.tp = self._group([number(r, u, i) for i in range(sizes.tp)])
        both = sizes.ring > 1 and sizes.ulysses > 1
        pieces = [number(i // sizes.ulysses, i % sizes.ulysses, t) for i in range(sizes.sequence)]
        self.sequence = self._group(pieces) if both else self.ring or self.ulysses
        self.tp_mesh = None if self.tp is None else DeviceMesh.from_group(self.tp, device_type)
        self.ring_rank = r

    def _group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        if len(ranks) == 1:
            return None
        if len(ranks) == self.sizes.total:
            return self.group
        made = _made.setdefault(self.group, {})
        key = tuple(ranks)
        if key not in made:
            backend = dist.get_backend(self.group)
            made[key] = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
        return made[key]


def agree(group: dist.ProcessGroup, check: Callable[[], T], fingerprint: Callable[[T], dict[str, Any]]) -> T:
    """Run ``check`` on every rank; raise everywhere if it raised anywhere, or where ranks have different fingerprints.

    Args:
        group: The ranks that have to agree.
        check: Raises where a rank cannot go on.
        fingerprint: What must be equal, by name, in plain values that compare.

    Raises:
        The rank's own error, if it has one.
        ValueError: Where another rank has one, or they differ; names the ranks and what differs.
    """
    error: Exception | None = None
    mine: dict[str, Any] = {}
    try:
        result = check()
        mine = fingerprint(result)
    except Exception as caught:
        error = caught
    told = None if error is None else f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (told, mine), group=group)
    if error is not None:
        raise error
    failed = {rank: text for rank, (text, _) in enumerate(everyone) if text is not None}
    if failed:
        raise ValueError(f"parallelism_config: not enabled, as {_listed(failed)}")
    for name, value in mine.items():
        others = {rank: theirs.get(name) for rank, (_, theirs) in enumerate(everyone)}
        if any(other != value for other in others.values()):
            raise ValueError(f"parallelism_config: ranks have different values of {name}: {_listed(others)}")
    return result


def _listed(values: dict[int, Any]) -> str:
    return "; ".join(f"rank {rank}: {value}" for rank, value in values.items())
