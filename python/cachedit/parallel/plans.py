"""Where each model's sequences are split and gathered, in the form of diffusers' ``_cp_plan``.

Diffusers says it for some models; the rows here are for others. A row is data: how it is used is in split.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..models import find_entry

__all__ = ["PLANS", "ContextPlan", "find_plan"]


@dataclass(frozen=True)
class In:
    """A tensor that is split (has the fields of diffusers' ``ContextParallelInput``)."""

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass(frozen=True)
class Out:
    """A tensor that is gathered (has the fields of diffusers' ``ContextParallelOutput``)."""

    gather_dim: int
    expected_dims: int | None = None


class ContextPlan(NamedTuple):
    """How one transformer class is split.

    Args:
        plan: By module name: what is split on the way in, or gathered on the way out.
        attention: Which modules attend over the pieces: beginnings of their names, ``*`` for one part of a name.
            Empty: all that lie where sequences are split.
    """

    plan: dict[str, Any]
    attention: tuple[str, ...] = ()


PLANS: dict[str, ContextPlan] = {}


def find_plan(transformer: nn.Module, given: dict[str, Any] | None = None) -> ContextPlan | None:
    """The plan that the user gave, else our row for the class or its nearest base class, else diffusers' own."""
    if given is not None:
        return ContextPlan(given)
    for cls in type(transformer).__mro__:
        if cls.__name__ in PLANS:
            return PLANS[cls.__name__]
        if vars(cls).get("_cp_plan"):
            return ContextPlan(vars(cls)["_cp_plan"])
    return None


def attention_modules(transformer: nn.Module, row: ContextPlan) -> list[nn.Module]:
    """The attention modules that see pieces."""
    names = row.attention or _regions(transformer, row.plan)
    found = []
    for name, module in transformer.named_modules():
        path = name.split(".")
        if hasattr(module, "processor") and any(_begins(path, pattern) for pattern in names):
            found.append(module)
    return found


def _begins(path: list[str], pattern: str) -> bool:
    parts = pattern.split(".") if pattern else []
    return len(parts) <= len(path) and all(part in ("*", own) for part, own in zip(parts, path, strict=False))


def _regions(transformer: nn.Module, plan: dict[str, Any]) -> list[str]:
    """Where sequences are split: everywhere if they come split into the model, else in its block lists."""
    starts = {
        name.rpartition(".")[0]
        for name, entries in plan.items()
        if isinstance(entries, dict) and name.rpartition(".")[2] == "0"
    }
    if not starts:
        return [""]
    entry = find_entry(transformer)
    lists = [item.name for group in entry.sections for item in group] if entry else []
    return sorted({*starts, *lists})
