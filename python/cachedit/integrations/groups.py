"""Decisions of ranks that an engine, and not this package, shares a transformer's work among."""

from __future__ import annotations

from typing import Any

from ..targets import enabled_controllers

__all__ = ["decide_together"]


def decide_together(target: Any, group: Any) -> None:
    """Have ranks reuse the same steps: the sums that make up a difference are added over ``group``.

    For engines that split sequences or weights by themselves. Every rank of the group makes the same calls; then all
    collectives inside the blocks are entered by all ranks, or by none. Enabling the cache again undoes it.

    Args:
        target: The transformer (or pipeline, or adapter) that the cache is enabled on.
        group: A ``torch.distributed.ProcessGroup``: ranks that hold the pieces of one request's streams. Ranks that
            hold the same piece, as under tensor parallelism, may be in it in equal numbers. None: this rank alone.

    Raises:
        ValueError: If the cache is not enabled there; for TeaCache's ``metric="sea"``, whose filter needs all tokens.
    """
    controllers = enabled_controllers("target", target)
    if group is not None and any(c.tap is not None and c.tap.sea is not None for c in controllers):
        raise ValueError('metric must be "l1" where ranks hold pieces of a sequence: the filter of "sea" needs all')
    for controller in controllers:
        controller.join(group)
