"""Every pipeline of vLLM-Omni's that has a row, on stand-ins whose blocks have the signatures of its own classes."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cachedit
import omni
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, alias
from cachedit.controller import controller_of
from cachedit.integrations.denoisers import DENOISERS
from cachedit.integrations.special import ADAPTERS, denoises_image
from cachedit.integrations.vllm_omni import CacheDiTBackend
from engines import pipeline

TRANSFORMERS = {
    "BooguImagePipeline": "BooguImageTransformer2DModel",
    "Cosmos3OmniDiffusersPipeline": "Cosmos3VFMTransformer",
    "Cosmos3OmniPipeline": "Cosmos3VFMTransformer",
    "DreamIDOmniPipeline": "FusionModel",
    "ErnieImagePipeline": "ErnieImageTransformer2DModel",
    "Flux2KleinPipeline": "Flux2Transformer2DModel",
    "Flux2Pipeline": "Flux2Transformer2DModel",
    "FluxDMD2Pipeline": "FluxTransformer2DModel",
    "FluxKontextPipeline": "FluxTransformer2DModel",
    "FluxPipeline": "FluxTransformer2DModel",
    "GlmImagePipeline": "GlmImageTransformer2DModel",
    "HeliosPipeline": "HeliosTransformer3DModel",
    "HunyuanImage3Pipeline": "HunyuanImage3Model",
    "HunyuanVideo15I2VPipeline": "HunyuanVideo15Transformer3DModel",
    "HunyuanVideo15Pipeline": "HunyuanVideo15Transformer3DModel",
    "Krea2Pipeline": "Krea2Transformer2DModel",
    "LTX23ImageToVideoPipeline": "LTX2VideoTransformer3DModel",
    "LTX23Pipeline": "LTX2VideoTransformer3DModel",
    "LTX2I2VDMD2Pipeline": "LTX2VideoTransformer3DModel",
    "LTX2ImageToVideoPipeline": "LTX2VideoTransformer3DModel",
    "LTX2ImageToVideoTwoStagesPipeline": "LTX2VideoTransformer3DModel",
    "LTX2Pipeline": "LTX2VideoTransformer3DModel",
    "LTX2T2VDMD2Pipeline": "LTX2VideoTransformer3DModel",
    "LTX2TwoStagesPipeline": "LTX2VideoTransformer3DModel",
    "LongCatImageEditPipeline": "LongCatImageTransformer2DModel",
    "LongCatImagePipeline": "LongCatImageTransformer2DModel",
    "Magi2Pipeline": "Magi2TransformerBlock",
    "MammothModa2DiTPipeline": "Transformer2DModel",
    "QwenImageDMD2Pipeline": "QwenImageTransformer2DModel",
    "QwenImageEditPipeline": "QwenImageTransformer2DModel",
    "QwenImageEditPlusPipeline": "QwenImageTransformer2DModel",
    "QwenImageLayeredPipeline": "QwenImageTransformer2DModel",
    "QwenImagePipeline": "QwenImageTransformer2DModel",
    "StableAudioPipeline": "StableAudioDiTModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "Wan22I2VPipeline": "WanTransformer3DModel",
    "Wan22Pipeline": "WanTransformer3DModel",
    "Wan22S2VPipeline": "WanS2VTransformer3DModel",
    "Wan22TI2VPipeline": "WanTransformer3DModel",
    "Wan22VACEPipeline": "WanTransformer3DModel",
    "WanI2VDMD2Pipeline": "WanTransformer3DModel",
    "WanPipeline": "WanTransformer3DModel",
    "WanT2VDMD2Pipeline": "WanTransformer3DModel",
}
ELSEWHERE = {"BagelPipeline", "SenseNovaU1Pipeline"}  # test_vllm_omni.py; below

COSMOS3 = SimpleNamespace(  # the only one that is cached by what it declares alone
    block_forward_patterns={"gen_layers": ForwardPattern.Pattern_3}, has_separate_cfg=True, check_forward_pattern=False
)
STEPS = 8


def test_every_row_is_tried():
    assert TRANSFORMERS.keys() | ELSEWHERE == DENOISERS.keys()


def build(name):
    """The pipeline with its transformer where it has it, and whether it guides by a second call."""
    transformer = omni.transformer(TRANSFORMERS[name])
    if name.startswith("Cosmos3"):
        transformer._cache_dit_adapter_config = COSMOS3
    pipe = pipeline(name)
    pipe.is_distilled, pipe._cache_dit_separate_cfg = False, True
    place, *inner = DENOISERS[name][0].path.split(".")
    for part in reversed(inner):
        transformer = SimpleNamespace(**{part: transformer})
    setattr(pipe, place, transformer)
    row = DENOISERS[name][0]
    in_turn = row.in_turn(pipe) if callable(row.in_turn) else row.in_turn
    return pipe, row.find(pipe), in_turn or name.startswith("Cosmos3")


@torch.inference_mode()
def steps(transformer, in_turn):
    """A request whose latents stand still, so that a step that is reused has to give what a computed one does."""
    hidden, *prompts = torch.randn(3, 1, 5, omni.DIM, generator=torch.Generator().manual_seed(1))
    branches = [prompt[:, :3] for prompt in (prompts if in_turn else prompts[:1])]
    return torch.stack([transformer(hidden, prompt, 0.5) for _ in range(STEPS) for prompt in branches])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_pipeline(name):
    pipe, transformer, in_turn = build(name)
    baseline = steps(transformer, in_turn)
    backend = CacheDiTBackend()
    backend.enable(pipe)
    backend.refresh(pipe, STEPS)
    runs = []
    last = transformer.get_submodule(list(transformer.lists)[-1])[-1]
    last.register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(steps(transformer, in_turn), baseline)
    assert len(runs) == 5 * (1 + in_turn)  # four steps of warm-up, and one after three in a row
    for stats in cachedit.summary(transformer, logging=False):
        assert stats.cached_steps == [4, 5, 6]
        assert len(stats.branches) == 1 + in_turn
    backend.disable(pipe)
    assert torch.equal(steps(transformer, in_turn), baseline)


# Its own module's calls, for adapters that transformers declare


@pytest.fixture
def cache_dit():
    alias.install(override=True)
    yield importlib.import_module("cache_dit")
    alias.uninstall()


def theirs(cache_dit, transformer, in_turn, check, patterns):
    """The adapter that vLLM-Omni's module makes, of what a transformer declares."""
    adapter = cache_dit.BlockAdapter(
        transformer=transformer,
        blocks=[getattr(transformer, name) for name in patterns],
        forward_pattern=list(patterns.values()),
        has_separate_cfg=in_turn,
        check_forward_pattern=check,
    )
    if "_is_cached" in vars(type(adapter.pipe)):
        del type(adapter.pipe)._is_cached
    return adapter


DECLARED = [name for name, rows in DENOISERS.items() if rows[0].blocks and name not in ELSEWHERE and not rows[0].patch]


@pytest.mark.parametrize("name", DECLARED)
def test_what_its_module_makes_of_it(cache_dit, name):
    _, transformer, in_turn = build(name)
    baseline = steps(transformer, in_turn)
    row = DENOISERS[name][0]
    adapter = theirs(cache_dit, transformer, in_turn, row.check, row.blocks)
    cache_dit.enable_cache(adapter, cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4))
    cache_dit.refresh_context(transformer, num_inference_steps=STEPS, verbose=False)
    torch.testing.assert_close(steps(transformer, in_turn), baseline)
    assert all(stats.cached_steps == [4, 5, 6, 7] for stats in cache_dit.summary(adapter, details=False))
    assert cache_dit.BlockAdapter.is_cached(adapter) and cache_dit.BlockAdapter.is_cached(transformer)
    cache_dit.disable_cache(adapter)
    assert not cache_dit.BlockAdapter.is_cached(adapter)


def test_its_requests_with_a_fresh_start(cache_dit):
    """Newer versions give the hint with each request; with a mask, by setting fields of a partial configuration."""
    _, transformer, _ = build("FluxPipeline")
    adapter = theirs(cache_dit, transformer, False, None, DENOISERS["FluxPipeline"][0].blocks)
    cache_dit.enable_cache(adapter, cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2))
    hint = {"force_refresh_step_hint": 5, "force_refresh_step_policy": "once"}
    cache_dit.refresh_context(transformer, cache_config=DBCacheConfig().reset(num_inference_steps=STEPS, **hint))
    for _ in range(2):
        steps(transformer, False)
        (stats,) = cache_dit.summary(transformer, logging=False)
        assert stats.cached_steps == [2, 3, 4, 7]
    changed = DBCacheConfig().reset(
        num_inference_steps=STEPS, steps_computation_mask=[1, 0] * 4, steps_computation_policy="static"
    )
    changed.force_refresh_step_hint, changed.force_refresh_step_policy = 5, "once"
    cache_dit.refresh_context(transformer, cache_config=changed, verbose=True)
    assert controller_of(transformer).config.force_refresh_step_hint == 5
    steps(transformer, False)
    (stats,) = cache_dit.summary(transformer, logging=False)
    assert stats.cached_steps == [1, 3, 6]  # the mask starts over as well


def test_its_requests_too_short_for_a_mask(cache_dit, caplog):
    """It gives no mask with them; the one of the request before does not fit."""
    _, transformer, _ = build("FluxPipeline")
    cache_dit.enable_cache(transformer, cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2))
    mask = {"steps_computation_mask": cache_dit.steps_mask(mask_policy="fast", total_steps=28)}
    cache_dit.refresh_context(transformer, cache_config=DBCacheConfig().reset(num_inference_steps=28, **mask))
    cache_dit.refresh_context(transformer, num_inference_steps=STEPS, verbose=False)
    assert "the steps_computation_mask of 28 steps is left out: there are 8 now" in caplog.text
    steps(transformer, False)
    (stats,) = cache_dit.summary(transformer, logging=False)
    assert stats.cached_steps == [2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="one entry per step: expected 8"):
        cache_dit.refresh_context(transformer, num_inference_steps=STEPS, **mask)


# Adapters with blocks of its own


class S2V(omni.Transformer):
    """Wan 2.2 S2V: audio is added between the blocks."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(omni.MODELS["WanS2VTransformer3DModel"])
        self.audio = nn.Linear(omni.DIM, omni.DIM)

    def after_transformer_block(self, index, hidden):
        return hidden + 0.1 * torch.tanh(self.audio(hidden)) if index in (0, 2, 5) else hidden


def own_adapter(cache_dit, name):
    """A subclass that changes what vLLM-Omni's does."""
    base = importlib.import_module("cache_dit.caching.cache_adapters.cache_adapter").CachedAdapter

    def collect_unified_blocks(cls, block_adapter, contexts_kwargs):
        raise AssertionError("not needed")

    return type(name, (base,), {"collect_unified_blocks": classmethod(collect_unified_blocks)})


def test_audio_between_blocks():
    transformer = S2V().eval()
    pipe = pipeline("Wan22S2VPipeline", transformer=transformer)
    baseline = steps(transformer, True)
    backend = CacheDiTBackend()
    backend.enable(pipe)
    backend.refresh(pipe, STEPS)
    cached = steps(transformer, True)
    torch.testing.assert_close(cached, baseline)
    assert torch.equal(cached[:8], baseline[:8])  # computed
    (stats,) = cachedit.summary(transformer, logging=False)
    assert stats.cached_steps == [4, 5, 6]
    backend.disable(pipe)
    assert "after_transformer_block" not in vars(transformer)
    assert torch.equal(steps(transformer, True), baseline)


def test_audio_between_blocks_by_its_module(cache_dit):
    transformer = S2V().eval()
    baseline = steps(transformer, True)
    for _ in range(2):  # per request, as its newer versions may enable it
        transformer._cache_dit_original_after_transformer_block = transformer.after_transformer_block
        adapter = theirs(cache_dit, transformer, True, True, {"blocks": ForwardPattern.Pattern_3})
        own_adapter(cache_dit, "Wan22S2VCachedAdapter").apply(adapter, cache_config=DBCacheConfig(Fn_compute_blocks=1))
        transformer.after_transformer_block = lambda block_idx, hidden_states: hidden_states
        torch.testing.assert_close(steps(transformer, True), baseline)
        (stats,) = cachedit.summary(transformer, logging=False)
        assert stats.cached_steps == []  # warm-up is 8 steps by default
        cache_dit.refresh_context(transformer, max_warmup_steps=2)
        torch.testing.assert_close(steps(transformer, True), baseline)
        (stats,) = cachedit.summary(transformer, logging=False)
        assert stats.cached_steps == [2, 3, 4, 5, 6, 7]
        cache_dit.disable_cache(adapter)
        assert torch.equal(steps(transformer, True), baseline)


class SenseNovaU1Model(nn.Module):
    """A language model that denoises images: what it reads is remembered, in place of a key-value cache."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        spec = omni.BlockList("hidden_states image_gen_indicators update_cache cache_dit_skip temb", "", "h")
        block = omni.block_class(spec)
        self.layers = nn.ModuleList(block(spec) for _ in range(6))

    def forward(self, inputs_embeds=None, image_gen_indicators=None, temb=0.5, **kwargs):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, temb=temb, image_gen_indicators=None, **kwargs)
        return inputs_embeds


@torch.inference_mode()
def generate(model):
    """A prompt is read; guidance is left out of the first two steps and the last one."""
    tokens = torch.randn(2, 1, 5, omni.DIM, generator=torch.Generator().manual_seed(1))
    image, text = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool)
    outputs = [model(inputs_embeds=tokens[0]), model(inputs_embeds=tokens[1], image_gen_indicators=text)]
    for step in range(STEPS + 3):
        skips = {"cache_dit_skip": True} if step in (0, 1, STEPS + 2) else {}
        for branch in tokens[: 1 if skips else 2]:
            outputs.append(model(branch, image_gen_indicators=image, update_cache=False, **skips))
    return torch.stack(outputs)


@pytest.mark.parametrize("way", ["ours", "theirs"])
def test_a_language_model_that_says_what_it_does(cache_dit, way):
    model = SenseNovaU1Model().eval()
    baseline = generate(model)
    if way == "ours":
        pipe = pipeline("SenseNovaU1Pipeline", language_model=SimpleNamespace(model=model))
        backend = CacheDiTBackend({"max_continuous_cached_steps": -1})
        backend.enable(pipe)
    else:
        adapter = theirs(cache_dit, model, True, True, {"layers": ForwardPattern.Pattern_3})
        config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4)
        own_adapter(cache_dit, "SensenovaCachedAdapter").apply(adapter, cache_config=config, calibrator_config=None)
        assert adapter.denoises is None  # what was given stays as it is
    for _ in range(2):
        cachedit.refresh_context(model, num_inference_steps=STEPS)
        torch.testing.assert_close(generate(model), baseline)
        (stats,) = cachedit.summary(model, logging=False)
        assert [len(branch.records) for branch in stats.branches.values()] == [STEPS, STEPS]
        assert stats.cached_steps == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("call", "denoises"),
    [
        ({}, False),
        ({"update_cache": False}, False),
        ({"update_cache": False, "image_gen_indicators": [True, True]}, True),
        ({"update_cache": False, "image_gen_indicators": [True, False]}, False),
        ({"image_gen_indicators": [True, True]}, False),
        ({"update_cache": False, "image_gen_indicators": [True, True], "cache_dit_skip": True}, False),
    ],
)
def test_which_calls_denoise(call, denoises):
    if "image_gen_indicators" in call:
        call["image_gen_indicators"] = torch.tensor(call["image_gen_indicators"])
    assert denoises_image(None, other=1, **call) is denoises


@pytest.mark.parametrize("name", ["BagelCachedAdapter", "LTX2AudioCachedAdapter"])
def test_adapters_that_are_not_needed(cache_dit, name):
    transformer = omni.transformer("LTX2VideoTransformer3DModel")
    adapter = theirs(cache_dit, transformer, True, False, {"transformer_blocks": ForwardPattern.Pattern_0})
    assert ADAPTERS[name](adapter) is adapter
    own_adapter(cache_dit, name).apply(adapter, cache_config=DBCacheConfig(Fn_compute_blocks=1))
    assert controller_of(transformer).has_separate_cfg


def test_the_adapter_checks_what_tells_calls_apart():
    transformer = omni.transformer("FluxTransformer2DModel")
    adapter = BlockAdapter(
        transformer=transformer, blocks_name="transformer_blocks", forward_pattern=ForwardPattern.Pattern_1, denoises=1
    )
    with pytest.raises(TypeError, match="denoises must be a function of a call's arguments, got"):
        cachedit.enable_cache(adapter)
