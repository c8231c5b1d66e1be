"""What parallelism has left on a module: looked up at every cached transformer, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["ATTRIBUTE", "SHARDS", "OnModule", "disable_parallelism", "is_parallel", "sequence_group"]

ATTRIBUTE = "_cachedit_parallel"  # of a module: an OnModule
SHARDS = "_cachedit_shards"  # of a module: into how many shards its weights have been cut


class OnModule(NamedTuple):
    """What is on one module."""

    sequence: dist.ProcessGroup | None
    undo: Callable[[], None]


def disable_parallelism(module: nn.Module) -> None:
    """Take it off; nothing happens where it is not on. Weights that were cut for tensor parallelism stay cut."""
    parallel = vars(module).pop(ATTRIBUTE, None)
    if parallel is not None:
        parallel.undo()


def is_parallel(transformer: nn.Module) -> bool:
    """Whether its work is split among ranks, or its weights are."""
    return any(name in vars(transformer) for name in (ATTRIBUTE, SHARDS))


def sequence_group(transformer: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that hold the pieces of a transformer's sequences, whose sums count together."""
    parallel = vars(transformer).get(ATTRIBUTE)
    return None if parallel is None else parallel.sequence
