"""What the tests of real use share: both kinds of caching, and putting them on toys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, DBPruneConfig

both_kinds = pytest.mark.parametrize("kind", [DBCacheConfig, DBPruneConfig], ids=["DBCache", "DBPrune"])


def reusing(kind: Any = DBCacheConfig, **fields: Any) -> Any:
    """Two computed steps, then all are reused, unless ``fields`` say otherwise."""
    return kind(**{"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 10.0, **fields})


def static(mask: Sequence[int] | str, kind: Any = DBCacheConfig, **fields: Any) -> Any:
    return reusing(kind, steps_computation_mask=mask, steps_computation_policy="static", **fields)


def enable(model: Any, config: Any, calibrator: Any = None, **adapter: Any) -> Any:
    """Put the cache on a toy."""
    fields = {"transformer": model, "blocks": model.blocks, "forward_pattern": model.pattern, **adapter}
    cachedit.enable_cache(BlockAdapter(**fields), config, calibrator)
    return model


def reused(target: Any) -> list[list[int]]:
    """Reused steps of the main branch, per section."""
    return [entry.cached_steps for entry in cachedit.summary(target, logging=False)]


def zeros(mask: Sequence[int] | str, steps: int | None = None) -> list[int]:
    """Steps that a mask lets be reused."""
    if isinstance(mask, str):
        mask = cachedit.steps_mask(total_steps=steps, mask_policy=mask)
    return [step for step, bit in enumerate(mask) if not bit]


def same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Whether two runs gave the same bits."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def traces(model: nn.Module) -> dict[str, Any]:
    """What enabling a cache touches: attributes, hooks, the classes of lists."""
    return {
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "hooks": {name: list(module._forward_hooks) for name, module in model.named_modules()},
        "state": list(model.state_dict()),
    }
