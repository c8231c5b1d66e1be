"""The ideal that a cached run is measured against: the same decisions, known beforehand and carried out for free.

An oracle run gets its decisions from a list. On a reused step the body's blocks are not there at all; nothing is
measured, stored or forecast. Its pictures are worthless, its time is what no cache can beat:
``efficiency = oracle time / cached time``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .adapter import TransformerPlan, plan_for

__all__ = ["oracle"]


@contextmanager
def oracle(transformer: nn.Module, computed: Sequence[bool], Fn: int, Bn: int = 0) -> Iterator[None]:
    """Inside, the transformer's forwards run with their body on or off as ``computed`` says, over and over.

    Args:
        transformer: A transformer of a known class, without the cache.
        computed: One entry per forward of a request; True runs all blocks, False the first Fn and the last Bn of each
            section only.
        Fn: Blocks at the start of each section that always run.
        Bn: Blocks at its end that always run.

    Raises:
        ValueError: If ``computed`` is empty, or the transformer's class is not known.
    """
    if not computed:
        raise ValueError("computed must have one entry per forward, got none")
    plan = plan_for(transformer)
    full = {item.name: item.blocks for section in plan.sections for item in section}
    short = _without_body(plan, Fn, Bn)
    calls = 0

    def swap(module: nn.Module, args: Any) -> None:
        nonlocal calls
        _install(module, full if computed[calls % len(computed)] else short)
        calls += 1

    handle = transformer.register_forward_pre_hook(swap)
    try:
        yield
    finally:
        handle.remove()
        _install(transformer, full)


def _without_body(plan: TransformerPlan, Fn: int, Bn: int) -> dict[str, nn.ModuleList]:
    short = {}
    for section in plan.sections:
        total, offset = sum(len(item.blocks) for item in section), 0
        for item in section:
            numbered = enumerate(item.blocks, offset)
            short[item.name] = nn.ModuleList([block for i, block in numbered if i < Fn or i >= total - Bn])
            offset += len(item.blocks)
    return short


def _install(transformer: nn.Module, lists: dict[str, nn.ModuleList]) -> None:
    for name, blocks in lists.items():
        parent, _, child = name.rpartition(".")
        transformer.get_submodule(parent)._modules[child] = blocks
