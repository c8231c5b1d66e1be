"""Finding what a user means: the transformers and controllers of a pipeline, an adapter or a module."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import BlockAdapter, TransformerPlan, plan_or_learn
from .controller import Controller, controller_of
from .models import find_transformers
from .register import BlockAdapterRegister
from .watch import PipelineWatch

__all__ = ["controllers_of", "enabled_controllers", "modules_of", "plans_of"]


def plans_of(target: Any) -> tuple[Any, list[TransformerPlan]]:
    """The pipeline, if there is one, and a plan per transformer."""
    adapter = target if isinstance(target, BlockAdapter) else BlockAdapterRegister.registered(target)
    if adapter is not None:
        return adapter.pipe, adapter.plans()
    if isinstance(target, nn.Module):
        return None, [plan_or_learn(target)]
    transformers = find_transformers(target)
    if not transformers:
        raise TypeError(
            "pipe_or_adapter must be a pipeline with a transformer, a torch.nn.Module or a BlockAdapter, "
            f"got {type(target).__name__}"
        )
    return target, [plan_or_learn(transformer, target) for transformer in transformers]


def modules_of(target: Any) -> list[nn.Module]:
    """The transformers."""
    if isinstance(target, BlockAdapter):
        modules = target.transformer if target.transformer is not None else getattr(target.pipe, "transformer", [])
        return list(modules) if isinstance(modules, (list, tuple)) else [modules]
    return [target] if isinstance(target, nn.Module) else list(find_transformers(target))


def controllers_of(target: Any) -> list[Controller]:
    """The controllers of those that the cache is enabled on."""
    watched = None if isinstance(target, (BlockAdapter, nn.Module)) else PipelineWatch.of(target)
    if watched is not None:
        return watched.controllers
    return [c for c in map(controller_of, modules_of(target)) if c is not None]


def enabled_controllers(name: str, target: Any) -> list[Controller]:
    """The same; a ValueError that names the argument where there is none."""
    controllers = controllers_of(target)
    if not controllers:
        raise ValueError(f"{name}: the cache is not enabled on this {type(target).__name__}")
    return controllers
