"""Putting the cache on and off beside other things that wrap a transformer's forward."""

import dataclasses
import inspect
import re

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook

import cachedit
import holds
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.forward import CachedForward
from holds import reused, reusing, same
from toys import flux_inputs, make_toy, run_flux, run_toy, tiny_flux

CONFIG = DBCacheConfig(
    Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0, num_inference_steps=5
)  # fmt: skip


class Scale(ModelHook):
    """accelerate's kind of hook: doubles the output, so that it shows whether and how often it ran."""

    def post_forward(self, module, output):
        output.sample = output.sample * 2
        return output


class DiffusersScale(DiffusersHook):
    def post_forward(self, module, output):
        output.sample = output.sample * 2
        return output


WRAPPERS = {
    "accelerate": (lambda model: add_hook_to_module(model, Scale()), remove_hook_from_module),
    "diffusers": (
        lambda model: HookRegistry.check_if_exists_or_initialize(model).register_hook(DiffusersScale(), "scale"),
        lambda model: HookRegistry.check_if_exists_or_initialize(model).remove_hook("scale"),
    ),
}


def enable(model):
    cachedit.enable_cache(model, CONFIG, TaylorSeerCalibratorConfig())


def run(model):
    return torch.stack(run_flux(model, 5))


@pytest.fixture(scope="module")
def plain():
    return run(tiny_flux())


@pytest.fixture(scope="module")
def cached():
    model = tiny_flux()
    enable(model)
    return run(model)


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("unhook_first", [True, False])
def test_hooks_come_and_go_in_any_order(kind, hook_first, unhook_first, plain, cached):
    hook, unhook = WRAPPERS[kind]
    model = tiny_flux()
    for put in (hook, enable) if hook_first else (enable, hook):
        put(model)
    torch.testing.assert_close(run(model), 2 * cached)
    assert cachedit.summary(model, logging=False)[0].cached_steps == [2, 3, 4]
    if unhook_first:
        unhook(model)
        torch.testing.assert_close(run(model), cached)
        cachedit.disable_cache(model)
    else:
        cachedit.disable_cache(model)
        assert torch.equal(run(model), 2 * plain)
        unhook(model)
    assert torch.equal(run(model), plain)
    assert not isinstance(model.forward, CachedForward)


def test_two_accelerate_hooks_around_the_cache(plain, cached):
    model = tiny_flux()
    add_hook_to_module(model, Scale())
    enable(model)
    add_hook_to_module(model, Scale(), append=True)
    torch.testing.assert_close(run(model), 4 * cached)
    remove_hook_from_module(model)
    cachedit.disable_cache(model)
    assert torch.equal(run(model), plain)


def cast(model):
    model.enable_layerwise_casting(torch.float16, torch.float32)


@pytest.mark.parametrize("order", [(cast, enable), (enable, cast)], ids=["before", "after"])
def test_layerwise_casting(order, cached):
    model = tiny_flux()
    for put in order:
        put(model)
    torch.testing.assert_close(run(model), cached, rtol=0.1, atol=0.05)
    assert cachedit.summary(model, logging=False)[0].cached_steps == [2, 3, 4]


def test_autocast():
    """The first block gets bfloat16 from a linear layer, and returns float32: its residual is that of the wider one."""
    model = holds.enable(make_toy(), reusing(num_inference_steps=5))
    plain, expected = run_toy(make_toy(), 5), run_toy(model, 5)
    for _ in range(2):  # the next request may run otherwise than the one before
        with torch.autocast("cpu", torch.bfloat16):
            outputs = run_toy(model, 5)
        assert reused(model) == [[2, 3, 4]]
        for ours, theirs, full in zip(outputs, expected, plain, strict=True):
            assert (ours - theirs).abs().max() < 0.05 * full.abs().max()
        assert same(run_toy(model, 5), expected)


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (
            {"residual_diff_threshold": 1e-9},
            r"nothing stored 1x, warm-up 1x, diff 3x; the smallest diff was 0\.",
        ),
        ({"max_warmup_steps": 8}, r"nothing stored 1x, warm-up 4x; the smallest diff was never measured"),
        ({"residual_diff_threshold": 0.0}, None),
        ({"max_cached_steps": 0}, None),
        ({"steps_computation_mask": [1] * 5, "steps_computation_policy": "static"}, None),
        ({}, None),
    ],
)
def test_a_cache_that_never_triggers_says_so_once(config, reasons, caplog):
    model = tiny_flux()
    cachedit.enable_cache(model, dataclasses.replace(CONFIG, **config))
    for _ in range(2):
        run(model)
    messages = [record.message for record in caplog.records if "never triggered" in record.message]
    assert len(messages) == (reasons is not None)
    if reasons is not None:
        assert re.search(reasons, messages[0]) and "in a request of 5 steps" in messages[0]


def test_forward_keeps_its_signature():
    model = tiny_flux()
    before = inspect.signature(model.forward)
    enable(model)
    assert inspect.signature(model.forward) == before


def test_a_wrapper_nobody_knows_of_is_left_in_place(plain, cached):
    model = tiny_flux()
    enable(model)
    inner, calls = model.forward, []
    model.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    assert torch.equal(run(model), cached)
    cachedit.disable_cache(model)
    assert torch.equal(run(model), plain) and len(calls) == 10


def test_weights_moved_and_saved_while_enabled(tmp_path, cached):
    model = tiny_flux()
    enable(model)
    run(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).requires_grad_(False)
    enable(again)
    torch.testing.assert_close(run(again), cached)
    model.to(torch.bfloat16)
    with torch.no_grad():
        for step in range(3):
            inputs = {name: value.bfloat16() for name, value in flux_inputs(step, 5).items()}
            assert model(**inputs).sample.dtype == torch.bfloat16
    assert cachedit.summary(model, logging=False)[0].cached_steps == [2]
