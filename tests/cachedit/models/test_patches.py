"""What the patches of the model table change, and that they put it back; test_families has the rest of the proof."""

import copy
import inspect

import pytest
import torch

import cachedit
from cachedit import DBCacheConfig
from cachedit.models import MODELS
from cachedit.models.patches import LattePatch
from cachedit.patch_functor import is_patched
from pipelines import build
from pipelines.common import normal


@pytest.fixture(scope="module")
def latte():
    return build("LattePipeline").pipe.transformer


def run(model, frames=3, steps=1, **kwargs):
    outputs = []
    for step in range(steps):
        latents, prompt = normal(2, 4, frames, 8, 8), normal(2, 5, 16, seed=1)
        with torch.no_grad():
            outputs.append(model(latents, torch.tensor([900 - step] * 2), prompt, return_dict=False, **kwargs)[0])
    return outputs[-1]


@pytest.mark.parametrize("kwargs", [{}, {"enable_temporal_attentions": False}, {"frames": 1}])
def test_a_patched_latte_computes_the_same(latte, kwargs):
    plain = run(latte, **kwargs)
    with LattePatch().applied(latte):
        assert is_patched(latte)
        assert torch.equal(run(latte, **kwargs), plain)
        assert torch.equal(run(copy.deepcopy(latte), **kwargs), plain)
    if not kwargs:
        assert not torch.allclose(run(latte, enable_temporal_attentions=False), plain)


def test_signatures_stay(latte):
    modules = latte, latte.transformer_blocks[0]
    before = [inspect.signature(module.forward) for module in modules]
    with LattePatch().applied(latte):
        assert [inspect.signature(module.forward) for module in modules] == before


def test_the_cache_patches_and_puts_back(latte):
    before = [dict(vars(module)) for module in latte.modules()]
    names = list(latte.state_dict())
    cachedit.enable_cache(latte, DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0))
    assert is_patched(latte) and list(latte.state_dict()) == names
    temporal = []
    handles = [
        block.register_forward_hook(lambda *_: temporal.append(1)) for block in latte.temporal_transformer_blocks
    ]
    run(latte, steps=3)
    for handle in handles:
        handle.remove()
    assert len(temporal) == 4 + 1 + 1  # a reused step skips both blocks of a pair
    cachedit.disable_cache(latte)
    for module, entries in zip(latte.modules(), before):
        assert {name: id(value) for name, value in vars(module).items()} == {n: id(v) for n, v in entries.items()}


def test_every_patch_of_the_table_is_tried_here():
    assert {entry.patch for entry in MODELS.values()} - {None} == {LattePatch}
