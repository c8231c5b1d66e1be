import pytest
import torch

import cachedit
from cachedit import BlockAdapter, DBPruneConfig, ParamsModifier, TaylorSeerCalibratorConfig
from holds import reusing
from toys import call_flux, make_toy, run_toy, tiny_flux_pipeline, toy_inputs


def flux_call(size=32, batch=1):
    return {
        "prompt_embeds": torch.randn(batch, 5, 16),
        "pooled_prompt_embeds": torch.randn(batch, 16),
        "guidance_scale": 1.0,
        "height": size,
        "width": size,
    }


def held(target):
    return sum(stats.bytes_held for stats in cachedit.summary(target, logging=False))


CASES = {
    "plain": (reusing(), None),
    "order 2": (reusing(Bn_compute_blocks=1), TaylorSeerCalibratorConfig(taylorseer_order=2)),
    "static mask": (reusing(steps_computation_mask="fast", steps_computation_policy="static"), None),
    "float8": (reusing(residual_float8=True), TaylorSeerCalibratorConfig()),
    "pruned, float8": (reusing(DBPruneConfig, residual_float8=True), None),
    "pruned": (reusing(DBPruneConfig, non_prune_block_ids=[2]), TaylorSeerCalibratorConfig()),
    "pruned, reduced": (reusing(DBPruneConfig, force_reduce_calibrator_vram=True), TaylorSeerCalibratorConfig()),
}


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(("config", "calibrator"), CASES.values(), ids=CASES)
def test_it_is_what_a_request_then_holds(config, calibrator, size):
    pipe = tiny_flux_pipeline()
    estimate = cachedit.estimate_memory(pipe, config, calibrator_config=calibrator, **flux_call(size, batch=2))
    cachedit.enable_cache(pipe, config, calibrator)
    call_flux(pipe, 8, size=size, batch=2)
    assert estimate.bytes == held(pipe) > 0


def test_blocks_are_hardly_computed_and_the_pipeline_is_left_as_it_was():
    pipe = tiny_flux_pipeline()
    expected = call_flux(pipe, 4)
    before = dict(vars(pipe.transformer)), set(vars(pipe))
    calls = []
    for name, module in pipe.transformer.named_modules():
        if name.count(".") == 1 and "transformer_blocks" in name:
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    cachedit.estimate_memory(pipe, reusing(Fn_compute_blocks=4), **flux_call())
    assert calls == ["transformer_blocks.0"] * 2
    assert (dict(vars(pipe.transformer)), set(vars(pipe))) == before
    assert torch.equal(call_flux(pipe, 4), expected)


def test_an_enabled_cache_goes_on():
    pipe = tiny_flux_pipeline()
    cachedit.enable_cache(pipe, reusing())
    expected = call_flux(pipe, 6)
    cachedit.estimate_memory(pipe, reusing(), **flux_call())
    assert torch.equal(call_flux(pipe, 6), expected)
    assert cachedit.summary(pipe, logging=False)[0].cached_steps == [2, 3, 4, 5]


def test_each_guidance_branch_and_each_section_counts():
    pipe = tiny_flux_pipeline()
    negative = {"negative_prompt_embeds": torch.randn(1, 5, 16), "negative_pooled_prompt_embeds": torch.randn(1, 16)}
    single = cachedit.estimate_memory(pipe, reusing(), **flux_call())
    double = cachedit.estimate_memory(pipe, reusing(), **flux_call(), **negative, true_cfg_scale=2.0)
    assert double.bytes == 2 * single.bytes and {row.branch for row in double.rows} == {"cond", "uncond"}
    modifiers = [ParamsModifier(), ParamsModifier(calibrator_config=TaylorSeerCalibratorConfig())]
    split = cachedit.estimate_memory(pipe, reusing(), params_modifiers=modifiers, **flux_call())
    assert [row.blocks for row in split.rows] == ["transformer_blocks", "single_transformer_blocks"]
    assert split.rows[1].bytes > split.rows[0].bytes == single.bytes
    assert f"one request: {split.bytes / 1e6:.1f} MB" in str(split)


def test_a_bare_transformer():
    model = make_toy()
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    estimate = cachedit.estimate_memory(adapter, reusing(), **toy_inputs(0, 4))
    cachedit.enable_cache(adapter, reusing())
    run_toy(model, 4)
    assert estimate.bytes == held(model) == 2 * 8 * 4 * (5 + 3 + 5)  # hidden, encoder, anchor


def test_bad_arguments():
    with pytest.raises(TypeError, match="pipe_or_adapter must be a pipeline"):
        cachedit.estimate_memory(object())
    with pytest.raises(TypeError, match="cache_config must be a DBCacheConfig, got dict"):
        cachedit.estimate_memory(tiny_flux_pipeline(), {})
