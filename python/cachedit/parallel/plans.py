"""Where each model's sequences are split and gathered, in the form of diffusers' ``_cp_plan``.

Diffusers says it for some models; the rows of plan_table.py are for others. How they are used is in split.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models import find_entry
from .plan_entries import ContextPlan, In, Out, Tokens
from .plan_table import PLANS, UNSPLIT

__all__ = ["PLANS", "UNSPLIT", "ContextPlan", "In", "Out", "Tokens", "attention_modules", "find_plan"]


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
