import copy
import itertools

import pytest
import torch

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ParamsModifier, TaylorSeerCalibratorConfig, TeaCacheConfig
from cachedit.sea import sea_filter
from toys import call_flux, flux_inputs, make_toy, run_toy, tiny_flux, tiny_flux_pipeline

STEPS = 16
SLOPE = (1.0, 0.0)  # the polynomial that leaves the signal's change as it is


def run(model, steps=STEPS):
    with torch.no_grad():
        return [inputs and model(**inputs)[0] for inputs in map(inputs_of, range(steps))]


def inputs_of(step, total=STEPS):
    inputs = flux_inputs(step, total)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    inputs["img_ids"] = torch.stack([torch.zeros(4, 4), rows, columns], -1).reshape(-1, 3)
    drift = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(9))
    return inputs | {"hidden_states": inputs["hidden_states"] + 1.5 * drift * (step / total) ** 2}


def signals(model):
    """Outputs of the first block's norm, as the uncached model computes them."""
    heard = []
    handle = model.transformer_blocks[0].norm1.register_forward_hook(lambda _m, _a, output: heard.append(output[0]))
    run(model)
    handle.remove()
    return heard


def simulate(heard, threshold, coefficients):
    """TeaCache in its plainest form: the reused steps."""
    reused, total = [], 0.0
    for step, (before, now) in enumerate(itertools.pairwise(heard), 1):
        change = ((now - before).abs().mean() / before.abs().mean()).item()
        total += abs(sum(c * change**i for i, c in enumerate(reversed(coefficients))))
        if total < threshold and step < STEPS - 1:
            reused.append(step)
        else:
            total = 0.0
    return reused


def enable(model, **settings):
    settings = {"num_inference_steps": STEPS, "coefficients": SLOPE} | settings
    return cachedit.enable_cache(model, TeaCacheConfig(**settings), TaylorSeerCalibratorConfig())


@pytest.mark.parametrize("threshold", [0.08, 0.1, 0.2])
def test_steps_are_reused_as_the_signal_says(threshold):
    model = tiny_flux()
    expected = simulate(signals(model), threshold, SLOPE)
    assert 2 < len(expected) < STEPS - 3
    enable(model, rel_l1_thresh=threshold)
    cached = run(model)
    (stats,) = cachedit.summary(model, logging=False)
    assert stats.cached_steps == expected
    # and what they then do is what DBCache does at these steps
    mask = [int(step not in expected) for step in range(STEPS)]
    config = DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask=mask, steps_computation_policy="static")
    cachedit.enable_cache(model, config, TaylorSeerCalibratorConfig())
    assert all(torch.equal(a, b) for a, b in zip(run(model), cached, strict=True))


def test_published_coefficients_are_found_by_the_class():
    model = tiny_flux()
    enable(model, coefficients=None, rel_l1_thresh=0.6)
    run(model)
    assert model._cachedit_controller.tap.coefficients[0] == 498.651651
    flux = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    assert cachedit.summary(model, logging=False)[0].cached_steps == simulate(signals(tiny_flux()), 0.6, flux)


def test_sea_measures_the_filtered_signal():
    model = tiny_flux()
    heard = [sea_filter(signal, (4, 4), 1 - step / STEPS, 2.0) for step, signal in enumerate(signals(model))]
    expected = simulate(heard, 0.1, SLOPE)
    assert expected != simulate(signals(model), 0.1, SLOPE)
    enable(model, metric="sea", rel_l1_thresh=0.1, coefficients=None)
    run(model)
    assert cachedit.summary(model, logging=False)[0].cached_steps == expected


def test_guidance_branches_and_requests_have_signals_of_their_own():
    pipe = tiny_flux_pipeline()
    enable(pipe, rel_l1_thresh=0.3, num_inference_steps=None)
    first = call_flux(pipe, 8)
    reused = cachedit.summary(pipe, logging=False)[0].cached_steps
    assert reused and 7 not in reused
    call_flux(pipe, 6, seed=3)
    assert torch.equal(call_flux(pipe, 8), first)


def test_each_transformer_hears_its_own_module():
    one, two = tiny_flux(seed=0), tiny_flux(seed=0)
    enable(one, rel_l1_thresh=0.1)
    expected = run(one)
    enable(two, rel_l1_thresh=0.3)
    run(two)
    assert all(torch.equal(a, b) for a, b in zip(run(one), expected, strict=True))


def test_hooks_come_and_go_with_the_cache():
    model = tiny_flux()
    norm = model.transformer_blocks[0].norm1
    baseline = run(model)
    enable(model)
    assert len(norm._forward_hooks) == 1
    enable(model)
    assert len(norm._forward_hooks) == 1
    other = copy.deepcopy(model)
    assert torch.equal(run(other)[-1], run(model)[-1])
    cachedit.refresh_context(model, cache_config=DBCacheConfig(Fn_compute_blocks=1))
    assert not norm._forward_hooks
    cachedit.refresh_context(model, cache_config=TeaCacheConfig())
    assert len(norm._forward_hooks) == 1
    cachedit.disable_cache(model)
    assert not norm._forward_hooks and len(other.transformer_blocks[0].norm1._forward_hooks) == 1
    assert all(torch.equal(a, b) for a, b in zip(run(model), baseline, strict=True))


def test_nothing_is_enabled_where_nothing_is_known_to_measure():
    model = make_toy()
    baseline = run_toy(model, 3)
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    with pytest.raises(ValueError, match="TeaCache does not know what to measure on Toy: add a row"):
        cachedit.enable_cache(adapter, TeaCacheConfig(coefficients=SLOPE))
    assert "_cachedit_controller" not in vars(model)
    assert all(torch.equal(a, b) for a, b in zip(run_toy(model, 3), baseline, strict=True))


def test_lists_of_one_transformer_measure_one_signal():
    modifiers = [ParamsModifier(), ParamsModifier(TeaCacheConfig(coefficients=(2.0, 0.0)))]
    with pytest.raises(ValueError, match="metric and coefficients must be the same for all block lists"):
        cachedit.enable_cache(tiny_flux(), TeaCacheConfig(coefficients=SLOPE), params_modifiers=modifiers)


def test_memory_is_estimated_with_the_signal():
    model = tiny_flux()
    config = TeaCacheConfig(rel_l1_thresh=0.1, coefficients=SLOPE)
    estimate = cachedit.estimate_memory(model, config, **inputs_of(0))
    cachedit.enable_cache(model, config)
    run(model)
    assert estimate.bytes == cachedit.summary(model, logging=False)[0].bytes_held


def test_from_a_file():
    section = {"cache_type": "TeaCache", "rel_l1_thresh": 0.25, "coefficients": [1, 0.5], "metric": "sea"}
    config, _ = cachedit.load_cache_config({"cache_config": section})
    assert config == TeaCacheConfig(rel_l1_thresh=0.25, coefficients=[1, 0.5], metric="sea")
