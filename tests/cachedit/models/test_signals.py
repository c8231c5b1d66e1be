"""What is tapped is the first block's modulated input, worked out again from the block's parameters."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cachedit.models.signals import FITS, SIGNALS, Signal, find_signal
from cachedit.sea import SEA_MODELS
from cachedit.teacache import POLYNOMIALS, TeaCacheConfig
from first_blocks import CASES


def tap(model: nn.Module, signal: Signal, block: str, call: dict) -> tuple[list[torch.Tensor], dict, list[str]]:
    """Run a call; returns what was tapped, the first block's inputs by name, and what happened in which order."""
    tapped: list[torch.Tensor] = []
    inputs: dict = {}
    events: list[str] = []

    def on_signal(module, args, kwargs, output):
        tapped.append(signal.read(args, kwargs, output))
        events.append("signal")

    def on_entry(module, args, kwargs):
        inputs.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    first = model.get_submodule(block)
    model.get_submodule(signal.module).register_forward_hook(on_signal, with_kwargs=True)
    first.register_forward_pre_hook(on_entry, with_kwargs=True)
    first.register_forward_hook(lambda *_: events.append("first block"))
    with torch.no_grad():
        model(**call)
    return tapped, inputs, events


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].build().eval().requires_grad_(False)


@pytest.mark.parametrize("name", CASES)
def test_signal_is_the_modulated_input_by_hand(name):
    case, model = CASES[name], build(name)
    call = case.call()
    tapped, inputs, events = tap(model, SIGNALS[name.split(",")[0]], case.block, call)
    expected = case.by_hand(model.get_submodule(case.block), inputs, model, call)
    assert events == ["signal", "first block"]  # once per forward, and before the decision
    assert tapped[0].abs().mean() > 0.01
    torch.testing.assert_close(tapped[0], expected)


def test_every_row_is_tried_above():
    assert {name.split(",")[0] for name in CASES} == set(SIGNALS)
    assert set(FITS) <= set(SIGNALS)


def test_signal_of_wan_with_retention_is_the_projection_of_the_embedding():
    model = build("WanTransformer3DModel")
    call = CASES["WanTransformer3DModel"].call()
    signal, _ = find_signal(model, TeaCacheConfig(coefficients="wan2.1-t2v-14b-ret"))
    tapped, inputs, _ = tap(model, signal, "blocks.0", call)
    torch.testing.assert_close(tapped[0].unflatten(1, (6, -1)), inputs["temb"])


def test_signal_of_wan_for_seacache_is_the_modulated_input():
    model = build("WanTransformer3DModel")
    call = CASES["WanTransformer3DModel"].call()
    tapped, inputs, events = tap(model, SEA_MODELS["WanTransformer3DModel"].signal, "blocks.0", call)
    block = model.blocks[0]
    shift, scale = (block.scale_shift_table + inputs["temb"])[:, :2].split(1, 1)
    states = inputs["hidden_states"]
    expected = nn.functional.layer_norm(states, states.shape[-1:], eps=1e-6) * (1 + scale) + shift
    assert events == ["signal", "first block"]
    torch.testing.assert_close(tapped[0], expected)


def test_read_says_what_it_found():
    with pytest.raises(TypeError, match=r"Signal\(module='norm', output=1.* found a list, not a tensor"):
        Signal("norm", output=1).read((), {}, (torch.zeros(1), []))


def pretend(name: str, base: type = nn.Module, **config: object) -> nn.Module:
    """A module of a class with this name, a config, and every module that could be tapped."""
    model = type(name, (base,), {})()
    model.config = config
    for signal in {*SIGNALS.values(), *(fit.signal for fits in FITS.values() for fit in fits if fit.signal)}:
        parent = model
        for part in signal.module.split("."):
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
    return model


COGVIDEOX_5B = {"use_rotary_positional_embeddings": True, "patch_size_t": None}
COGVIDEOX_15 = {"use_rotary_positional_embeddings": True, "patch_size_t": 2}
WAN = "WanTransformer3DModel"


@pytest.mark.parametrize(
    ("cls", "config", "expected"),
    [
        ("FluxTransformer2DModel", {}, "flux"),
        ("QwenImageTransformer2DModel", {}, "qwen-image"),
        ("HunyuanVideoTransformer3DModel", {"image_condition_type": None}, "hunyuan-video"),
        ("CogVideoXTransformer3DModel", {"use_rotary_positional_embeddings": False}, "cogvideox-2b"),
        ("CogVideoXTransformer3DModel", {**COGVIDEOX_5B, "in_channels": 16}, "cogvideox-5b"),
        ("CogVideoXTransformer3DModel", {**COGVIDEOX_5B, "in_channels": 32}, "cogvideox-5b"),
        ("CogVideoXTransformer3DModel", {**COGVIDEOX_15, "in_channels": 16}, "cogvideox1.5-5b"),
        ("CogVideoXTransformer3DModel", {**COGVIDEOX_15, "in_channels": 32}, "cogvideox1.5-5b-i2v"),
        ("ConsisIDTransformer3DModel", {}, "cogvideox-5b"),
        ("LTXVideoTransformer3DModel", {}, "ltx-video"),
        ("MochiTransformer3DModel", {}, "mochi"),
        ("Lumina2Transformer2DModel", {}, "lumina2"),
        (WAN, {"num_layers": 30, "in_channels": 16}, "wan2.1-t2v-1.3b"),
        (WAN, {"num_layers": 40, "in_channels": 16}, "wan2.1-t2v-14b"),
    ],
)
def test_default_polynomial(cls, config, expected):
    signal, coefficients = find_signal(pretend(cls, **config), TeaCacheConfig())
    assert (signal, coefficients) == (SIGNALS[cls], POLYNOMIALS[expected])


def test_polynomials_all_belong_to_a_class_and_fit_their_signal():
    fits = [(cls, fit) for cls, fits in FITS.items() for fit in fits]
    assert {fit.polynomial for _, fit in fits} == set(POLYNOMIALS)
    for cls, fit in fits:
        found = find_signal(pretend(cls), TeaCacheConfig(coefficients=fit.polynomial))
        assert found == (fit.signal or SIGNALS[cls], POLYNOMIALS[fit.polynomial])


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (
            WAN,
            {"num_layers": 40, "in_channels": 36, "image_dim": 1280},
            "may be one of several models; give 'wan2.1-i2v-480p' or 'wan2.1-i2v-720p'",
        ),
        (
            WAN,
            {"num_layers": 30, "in_channels": 48},
            "none are the default for WanTransformer3DModel .*'wan2.1-t2v-14b",
        ),
        ("HiDreamImageTransformer2DModel", {}, "give numbers, or 'hidream-i1-full'"),
        (
            "HunyuanVideoTransformer3DModel",
            {"image_condition_type": "latent_concat"},
            "give numbers, or 'hunyuan-video'",
        ),
        ("SD3Transformer2DModel", {}, "none are published for SD3Transformer2DModel; .* FluxTransformer2DModel"),
        ("SomebodysTransformer", {}, r"does not know what to measure on SomebodysTransformer: .*signals.SIGNALS"),
    ],
)
def test_no_default_is_an_error_that_names_the_options(cls, config, message):
    with pytest.raises(ValueError, match=message):
        find_signal(pretend(cls, **config), TeaCacheConfig())


def test_numbers_are_taken_as_they_are():
    signal, coefficients = find_signal(pretend("SD3Transformer2DModel"), TeaCacheConfig(coefficients=[2.0, 0.5]))
    assert (signal, coefficients) == (SIGNALS["SD3Transformer2DModel"], (2.0, 0.5))


def test_a_subclass_has_the_row_of_its_base():
    base = type("FluxTransformer2DModel", (nn.Module,), {})
    assert find_signal(pretend("MyFlux", base), TeaCacheConfig())[1] == POLYNOMIALS["flux"]


def test_a_module_that_is_not_there_is_an_error():
    model = type("FluxTransformer2DModel", (nn.Module,), {"config": SimpleNamespace()})()
    with pytest.raises(ValueError, match=r"taps 'transformer_blocks.0.norm1' of FluxTransformer2DModel, but"):
        find_signal(model, TeaCacheConfig(coefficients="flux"))
