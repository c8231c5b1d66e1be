import logging

import pytest
import torch
from torch import nn

import cachedit
from cachedit import (
    BlockAdapter,
    DBCacheConfig,
    DBPruneConfig,
    ForwardPattern,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
    TeaCacheConfig,
)
from cachedit.models import MODELS
from toys import Shaped, call_flux, make_toy, run_toy, tiny_flux_pipeline, toy_inputs

P = ForwardPattern


def config(kind=DBCacheConfig, **settings):
    return kind(**{"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1e9, **settings})


def steps(model):
    (stats,) = cachedit.summary(model, logging=False)
    return stats.cached_steps


@pytest.mark.parametrize("kind", [DBCacheConfig, DBPruneConfig])
@pytest.mark.parametrize("pattern", list(P), ids=lambda p: p.name)
def test_a_transformer_nobody_has_described(pattern, kind):
    unknown, described = make_toy(pattern=pattern), make_toy(pattern=pattern)
    baseline = run_toy(unknown, 8)
    assert cachedit.enable_cache(unknown, config(kind), TaylorSeerCalibratorConfig()) is unknown
    adapter = BlockAdapter(transformer=described, blocks=described.blocks, forward_pattern=pattern)
    cachedit.enable_cache(adapter, config(kind), TaylorSeerCalibratorConfig())
    for model in (unknown, described):
        run_toy(model, 8)  # the first request learns; blocks that work in place are found out
        cachedit.refresh_context(model)
    assert all(torch.equal(a, b) for a, b in zip(run_toy(unknown, 8), run_toy(described, 8), strict=True))
    assert steps(unknown) == steps(described) != []
    cachedit.disable_cache(unknown)
    assert type(unknown.blocks) is nn.ModuleList and "_cachedit_controller" not in vars(unknown)
    assert all(torch.equal(a, b) for a, b in zip(run_toy(unknown, 8), baseline, strict=True))


def test_the_first_forward_is_the_first_step_of_its_request():
    model = make_toy()
    baseline = run_toy(model, 6)[:2]
    cachedit.enable_cache(model, config(steps_computation_mask=[1, 1, 0, 1, 0, 1], num_inference_steps=6))
    outputs = run_toy(model, 6)
    assert all(torch.equal(a, b) for a, b in zip(outputs[:2], baseline, strict=True))
    (stats,) = cachedit.summary(model, logging=False)
    assert stats.cached_steps == [2, 4] and stats.main.records[0].reason == "learning"
    run_toy(model, 6)
    assert steps(model) == [2, 4]


def test_in_a_pipeline(monkeypatch):
    known, unknown = tiny_flux_pipeline(), tiny_flux_pipeline()
    cachedit.enable_cache(known, config())
    monkeypatch.delitem(MODELS, "FluxTransformer2DModel")
    cachedit.enable_cache(unknown, config())
    for pipe in (known, unknown):
        call_flux(pipe, 6)
    assert torch.equal(call_flux(unknown, 6), call_flux(known, 6))
    assert steps(unknown) == steps(known) == [2, 3, 4, 5]
    (stats,) = cachedit.summary(unknown, logging=False)
    assert stats.blocks == "transformer_blocks+single_transformer_blocks" and list(stats.branches) == ["cond"]


@pytest.mark.parametrize("shape", ["between", "kept", "early exit"])
def test_a_refusal_takes_the_cache_off(shape):
    torch.manual_seed(0)
    model = Shaped(shape).eval().requires_grad_(False)
    (baseline,) = run_toy(model, 1)
    cachedit.enable_cache(model, config())
    with pytest.raises(ValueError, match="Shaped is not in the model table, and cannot be cached as it is: blocks"):
        model(**toy_inputs(0, 1))
    assert "_cachedit_controller" not in vars(model) and "forward" not in vars(model)
    assert torch.equal(run_toy(model, 1)[0], baseline)


def test_an_exception_in_the_model_is_the_models():
    model = make_toy()
    cachedit.enable_cache(model, config())
    with torch.no_grad(), pytest.raises(TypeError, match="missing"):
        model(torch.zeros(1))
    run_toy(model, 4)
    assert steps(model) == [2, 3]


def test_auto_says_what_is_expected_and_which_lists_count():
    model = make_toy()
    cachedit.enable_cache(BlockAdapter(transformer=model, auto=True, forward_pattern=P.Pattern_0), config())
    run_toy(model, 4)
    assert steps(model) == [2, 3]
    cachedit.enable_cache(BlockAdapter(transformer=model, auto=True, forward_pattern=P.Pattern_1), config())
    with pytest.raises(ValueError, match="Pattern_1 is given, but the blocks were seen to be Pattern_0"):
        run_toy(model, 1)
    for fields in ({"allow_prefixes": ["layers"]}, {"check_suffixes": True, "allow_suffixes": ["Layer"]}):
        with pytest.raises(ValueError, match=r"has no list of 3 or more blocks to look at .its lists are blocks"):
            cachedit.enable_cache(BlockAdapter(transformer=model, auto=True, **fields), config())
    with pytest.raises(ValueError, match="blocks_policy must be 'max' or 'min', got 'most'"):
        cachedit.enable_cache(BlockAdapter(transformer=model, auto=True, blocks_policy="most"), config())
    with pytest.raises(ValueError, match="with auto one pattern stands for all lists, got 2"):
        BlockAdapter(transformer=model, auto=True, forward_pattern=[P.Pattern_0, P.Pattern_1]).plans()


def test_settings_are_checked_when_the_cache_is_enabled():
    model = make_toy()
    with pytest.raises(ValueError, match=r"Fn_compute_blocks \+ Bn_compute_blocks = 8 is more than the 6 blocks"):
        cachedit.enable_cache(model)
    with pytest.raises(ValueError, match="TeaCache does not know what to measure on Toy"):
        cachedit.enable_cache(model, TeaCacheConfig())
    with pytest.raises(ValueError, match="Linear is not in the model table, and has no list of 3 or more blocks"):
        cachedit.enable_cache(nn.Linear(2, 2), config())
    with pytest.raises(ValueError, match="the blocks of Toy are not known; describe them with BlockAdapter"):
        cachedit.estimate_memory(model, config(), **toy_inputs(0, 1))
    assert "_cachedit_controller" not in vars(model)


def test_refresh_and_modifiers_before_anything_is_learnt(caplog):
    model = make_toy()
    with caplog.at_level(logging.INFO, logger="cachedit"):
        cachedit.enable_cache(model, config(), params_modifiers=ParamsModifier(max_warmup_steps=3))
        cachedit.refresh_context(model, num_inference_steps=6)
        run_toy(model, 6)
    assert steps(model) == [3, 4, 5]
    assert any("learnt on Toy: blocks (Pattern_0), 6 blocks" in record.message for record in caplog.records)
