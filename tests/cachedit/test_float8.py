"""residual_float8: stored residuals in E4M3."""

import math
from dataclasses import replace

import pytest
import torch

import cachedit
from cachedit import (
    BlockAdapter,
    DBCacheConfig,
    DBPruneConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    ForwardPattern,
    HermiteCalibratorConfig,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
    TeaCacheConfig,
)
from cachedit.store import ResidualStore
from cachedit_kernels.float8.reference import from_e4m3, to_e4m3
from toys import DIM, call_flux, flux_inputs, make_toy, run_toy, tiny_flux, tiny_flux_pipeline

STEPS = 10
CALIBRATORS = {
    "plain reuse": None,
    "TaylorSeer": TaylorSeerCalibratorConfig(taylorseer_order=2),
    "hidden stream only": TaylorSeerCalibratorConfig(enable_encoder_calibrator=False),
    "outputs": TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states"),
    "Hermite": HermiteCalibratorConfig(),
    "FoCa": FoCaCalibratorConfig(),
    "DMD": DMDCalibratorConfig(dmd_history=4),
}
POLICIES = {
    "DBCache": DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=1e9, warmup_interval=2),
    "DBPrune": DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=1e9),
    "TeaCache": TeaCacheConfig(1e9, (1.0, 0.0), max_warmup_steps=4),
}


def toy_adapter(model):
    return BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)


def held(target):
    return sum(stats.bytes_held for stats in cachedit.summary(target, logging=False))


def run(config, calibrator, float8, dtype=torch.float32):
    model = tiny_flux().to(dtype)
    cachedit.enable_cache(model, replace(config, residual_float8=float8), calibrator)
    cachedit.refresh_context(model, num_inference_steps=STEPS)
    with torch.no_grad():
        inputs = [{name: t.to(dtype) for name, t in flux_inputs(step, STEPS).items()} for step in range(STEPS)]
        outputs = torch.stack([model(**each, return_dict=False)[0] for each in inputs])
    reused = cachedit.summary(model, logging=False)[0].main.reused_steps
    return outputs, reused, held(model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("calibrator", CALIBRATORS.values(), ids=CALIBRATORS)
def test_decisions_stay_and_outputs_nearly_do(policy, calibrator):
    config = POLICIES[policy]
    plain, reused, plain_bytes = run(config, calibrator, False)
    quantised, also_reused, quantised_bytes = run(config, calibrator, True)
    assert reused and also_reused == reused and quantised_bytes < plain_bytes
    assert not torch.equal(quantised, plain)
    assert (quantised - plain).norm() < 0.1 * plain.norm()
    computed = [step for step in range(STEPS) if step < min(reused)]
    assert torch.equal(quantised[computed], plain[computed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [False, True])
def test_what_is_forecast_is_what_was_rounded(dtype, outputs):
    """Streams of an odd width; a forecast of first order from two residuals (or outputs) in E4M3."""
    cache_type = "hidden_states" if outputs else "residual"
    store = ResidualStore(TaylorSeerCalibratorConfig(calibrator_cache_type=cache_type), float8=True)
    shapes = [(2, 9, 7), (2, 3, 13)]
    values = []
    for step in (0, 2):
        before, after = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
        store.push(step, before, after)
        kept = after if outputs else [a.float() - b.float() for a, b in zip(after, before)]
        values.append([from_e4m3(*to_e4m3(k), torch.float32) for k in kept])
    streams = [torch.randn(shape).to(dtype) for shape in shapes]
    for got, stream, old, new in zip(store.forecast(3, streams), streams, *values):
        expected = 1.5 * new - 0.5 * old + (0.0 if outputs else stream.float())
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_held(dtype):
    """A byte per element and four per token of each residual; the anchor as before."""
    config, calibrator = POLICIES["DBCache"], TaylorSeerCalibratorConfig(taylorseer_order=2)
    *_, held_bytes = run(config, calibrator, True, dtype)
    tokens, width = 16 + 5, 32
    assert held_bytes == 3 * tokens * (width + 4) + 16 * width * dtype.itemsize


def test_the_anchor_keeps_its_dtype_and_decides_alike():
    diffs = []
    for float8 in (False, True):
        model = make_toy()
        config = DBCacheConfig(
            residual_diff_threshold=1e9, Fn_compute_blocks=2, max_warmup_steps=2, residual_float8=float8
        )
        cachedit.enable_cache(toy_adapter(model), config)
        cachedit.refresh_context(model, num_inference_steps=3)
        run_toy(model, 3)
        diffs.append(cachedit.summary(model, logging=False)[0].main.diffs)
    assert diffs[0] == diffs[1] and diffs[0]


def test_it_is_switched_on_and_off_between_requests():
    model = make_toy()
    adapter = toy_adapter(model)
    config = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=1e9, max_warmup_steps=2)
    cachedit.enable_cache(adapter, config, TaylorSeerCalibratorConfig())
    results, sizes = [], []
    for float8 in (False, True, False, True):
        cachedit.refresh_context(model, num_inference_steps=6, residual_float8=float8)
        results.append(torch.stack(run_toy(model, 6)))
        sizes.append(held(model))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    elements, tokens = 2 * 8 * DIM, 2 * 8
    assert sizes[0] == sizes[2] and sizes[1] == sizes[3] == sizes[0] - 2 * (4 * elements - elements - 4 * tokens)
    cachedit.refresh_context(model, DBCacheConfig().reset(max_warmup_steps=3))  # says nothing about it
    assert cachedit.summary(model, logging=False)[0].cache_options["cache_config"].residual_float8


def test_one_of_several_lists():
    """Lists whose settings differ decide separately, here only in how they store."""
    pipe = tiny_flux_pipeline()
    config = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=1e9, max_warmup_steps=2)
    modifiers = [None, ParamsModifier(residual_float8=True)]
    estimate = cachedit.estimate_memory(
        pipe,
        config,
        params_modifiers=modifiers,
        prompt_embeds=torch.randn(1, 5, 16),
        pooled_prompt_embeds=torch.randn(1, 16),
        guidance_scale=1.0,
        height=32,
        width=32,
    )
    cachedit.enable_cache(pipe, config, params_modifiers=modifiers)
    call_flux(pipe, 6)
    assert estimate.bytes == held(pipe)


def test_files_and_tags():
    config, _ = cachedit.load_cache_config({"cache_config": {"residual_float8": True}})
    assert config.residual_float8 is True and config.strify().endswith("_FP8")
    assert "FP8" not in DBCacheConfig().strify()
    with pytest.raises(ValueError, match="residual_float8 must be true or false, got 'yes please'"):
        cachedit.load_cache_config({"cache_config": {"residual_float8": "yes please"}})


@pytest.mark.parametrize("value", ["float8", 1, None])
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match="residual_float8 must be True or False, got"):
        cachedit.enable_cache(toy_adapter(make_toy()), DBCacheConfig(residual_float8=value))


def test_a_residual_that_is_not_finite_spoils_no_later_step():
    store = ResidualStore(None, float8=True)
    ones = torch.ones(1, 3, 7)
    store.push(0, [ones], [ones * math.nan])
    assert store.forecast(1, [ones])[0].isnan().all()
    store.push(2, [ones], [ones * 3])
    assert (store.forecast(3, [ones])[0] == 3).all()


@pytest.mark.parametrize("pattern", [ForwardPattern.Pattern_1, ForwardPattern.Pattern_3, ForwardPattern.Pattern_5])
def test_other_patterns(pattern):
    outputs = []
    for float8 in (False, True):
        model = make_toy(pattern=pattern)
        config = DBCacheConfig(
            Fn_compute_blocks=1, residual_diff_threshold=1e9, max_warmup_steps=2, residual_float8=float8
        )
        cachedit.enable_cache(toy_adapter(model), config, TaylorSeerCalibratorConfig())
        cachedit.refresh_context(model, num_inference_steps=5)
        outputs.append(torch.stack(run_toy(model, 5)))
    assert not torch.equal(*outputs) and (outputs[1] - outputs[0]).norm() < 0.05 * outputs[0].norm()
