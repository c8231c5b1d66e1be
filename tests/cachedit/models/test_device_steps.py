"""Small transformers of diffusers whose steps the device decides, against the eager engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.controller import controller_of
from cachedit.cuda_graphs import ForwardGraphs
from captures import Composes
from first_blocks import CASES

STEPS = 6
SHORT = {"ChromaTransformer2DModel", "Flux2Transformer2DModel", "HiDreamImageTransformer2DModel"}  # lists of one block


@pytest.mark.parametrize("name", sorted(set(CASES) - SHORT))
def test_same_pictures_and_decisions(backend: Composes, name: str) -> None:
    config = DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=2,
        residual_diff_threshold=10.0,
        max_continuous_cached_steps=2,
        num_inference_steps=STEPS,
    )
    results: list[Any] = []
    for its in (None, backend):
        torch.manual_seed(0)
        model = CASES[name].build().eval().requires_grad_(False)
        call = CASES[name].call()
        times = {key: call[key] for key in ("timestep", "t") if isinstance(call.get(key), torch.Tensor)}
        cachedit.enable_cache(model, config, TaylorSeerCalibratorConfig())
        controller = controller_of(model)
        controller.graphs = None if its is None else ForwardGraphs(controller, backend=its)
        outputs = []
        with torch.no_grad():
            for step in range(STEPS):
                now = {key: (value * (1 - step / 9)).to(value.dtype) for key, value in times.items()}
                output = model(**{**call, **now})
                outputs += [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        (stats,) = cachedit.summary(model, logging=False)
        results.append((outputs, stats.main.records))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert results[1][1] == results[0][1] and [r.reused for r in results[0][1]] == [
        False,
        False,
        True,
        True,
        False,
        True,
    ]
    assert controller.graphs.replays == STEPS - 1, str(controller.graphs)
