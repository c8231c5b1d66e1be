"""The calls of vLLM-Omni's workers, and those of its own backend module, on stand-ins for its pipelines."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cachedit
from cachedit import CacheType, ForwardPattern, alias
from cachedit.controller import controller_of
from cachedit.integrations import vllm_omni
from cachedit.integrations.denoisers import DENOISERS
from cachedit.integrations.vllm_omni import (
    CacheDiTBackend,
    Denoiser,
    DiffusionCacheConfig,
    TeaCacheBackend,
    enabler,
    register_enabler,
)
from engines import FluxTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel, pipeline

GUIDE = {  # the configuration reference of its guide
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 4,
    "max_cached_steps": -1,
    "max_continuous_cached_steps": 3,
    "residual_diff_threshold": 0.24,
    "num_inference_steps": None,
    "enable_taylorseer": False,
    "taylorseer_order": 1,
    "scm_steps_mask_policy": None,
    "scm_steps_policy": "dynamic",
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wan22(boundary_ratio=0.5):
    return pipeline(
        "Wan22Pipeline",
        boundary_ratio=boundary_ratio,
        transformer=WanTransformer3DModel(),
        transformer_2=WanTransformer3DModel(),
    )


def stats_of(transformer):
    (stats,) = cachedit.summary(transformer, logging=False)
    return stats


def counts(transformer):
    return {name: len(branch.records) for name, branch in stats_of(transformer).branches.items()}


def serve(backend, pipe, steps, seed=0):
    """What a worker does with a request."""
    if backend.is_enabled():
        backend.refresh(pipe, steps)
    return pipe(steps, seed)


# Configuration


def test_fields_and_defaults_of_the_guide():
    config = CacheDiTBackend().config
    assert {name: getattr(config, name) for name in GUIDE} == GUIDE
    assert config.rel_l1_thresh == 0.2 and config.coefficients is None
    assert CacheDiTBackend({}).config == CacheDiTBackend(None).config == config


def test_a_dictionary_or_their_object():
    given = {"max_warmup_steps": 2, "enable_taylorseer": True, "taylorseer_order": 2}
    config = CacheDiTBackend(given).config
    assert dataclasses.asdict(config) == dataclasses.asdict(DiffusionCacheConfig()) | given
    theirs = SimpleNamespace(**GUIDE | given, rel_l1_thresh=0.3, _extra_params={"mag_ratios": []})
    assert CacheDiTBackend(theirs).config == dataclasses.replace(config, rel_l1_thresh=0.3)
    assert config.calibrator_config() == cachedit.TaylorSeerCalibratorConfig(taylorseer_order=2)
    with pytest.raises(ValueError, match="cache_config: fn_compute_blocks is none of rel_l1_thresh, coefficients, Fn_"):
        CacheDiTBackend({"fn_compute_blocks": 1})


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 6, 8, 28])
def test_masks_follow_the_steps(steps):
    config = DiffusionCacheConfig(scm_steps_mask_policy="fast", scm_steps_policy="static").for_steps(steps)
    assert config.num_inference_steps == steps
    if steps in (1, 3, 5):
        assert config.steps_computation_mask == [1] * min(steps, 4) + [0] * max(steps - 4, 0)
        assert config.steps_computation_policy == "dynamic"
    else:
        assert config.steps_computation_mask == cachedit.steps_mask(mask_policy="fast", total_steps=steps)
        assert config.steps_computation_policy == "static"
    assert DiffusionCacheConfig().for_steps(steps).steps_computation_mask is None


# Requests


def test_a_transformer_that_is_known_by_its_class():
    pipe = pipeline("QwenImagePipeline", transformer=QwenImageTransformer2DModel())
    baseline = pipe(10)
    backend = CacheDiTBackend({"enable_taylorseer": True})
    backend.refresh(pipe, 10)  # before anything is enabled: only a warning
    assert not backend.is_enabled()
    backend.enable(pipe)
    assert backend.is_enabled()
    serve(backend, pipe, 1)  # the engine's own warm-up
    cached = serve(backend, pipe, 10)
    assert counts(pipe.transformer) == {"uncond": 10, "cond": 10}
    assert stats_of(pipe.transformer).cached_steps == [4, 5, 6, 8, 9]
    assert 0 < (cached - baseline).abs().max() < 0.1
    assert torch.equal(serve(backend, pipe, 10), cached) and not torch.equal(serve(backend, pipe, 10, seed=1), cached)
    backend.disable(pipe)
    assert not backend.is_enabled() and torch.equal(serve(backend, pipe, 10), baseline)


def test_a_mask_for_each_request(caplog):
    pipe = pipeline("QwenImagePipeline", transformer=QwenImageTransformer2DModel())
    config = {"scm_steps_mask_policy": "fast", "scm_steps_policy": "static", "num_inference_steps": 28}
    backend = CacheDiTBackend(config)
    backend.enable(pipe)
    for steps in (28, 5, 10):
        with caplog.at_level("INFO", logger="cachedit"):
            backend.refresh(pipe, steps, verbose=steps == 10)
        pipe(steps)
        mask = backend.config.for_steps(steps).steps_computation_mask
        assert stats_of(pipe.transformer).cached_steps == [i for i, computed in enumerate(mask) if not computed]
    assert caplog.text.count("refreshed QwenImageTransformer2DModel") == 1


@pytest.mark.parametrize(("ratio", "shares"), [(0.5, (6, 4)), (0.875, (2, 8)), (None, (10, 0)), (0.0, (10, 0))])
def test_two_transformers_split_at_the_boundary(ratio, shares):
    pipe = wan22(ratio)
    backend = CacheDiTBackend()
    backend.enable(pipe)
    pipe.scheduler.set_timesteps(3)
    backend.refresh(pipe, 10)
    assert len(pipe.scheduler.timesteps) == 3  # left alone
    pipe(10)
    for transformer, share in zip((pipe.transformer, pipe.transformer_2), shares):
        assert counts(transformer) == ({"uncond": share, "cond": share} if share else {})
        if share:
            assert controller_of(transformer).config.num_inference_steps == share
    low = controller_of(pipe.transformer_2).config
    assert (low.max_warmup_steps, low.max_cached_steps) == (2, 20)
    assert controller_of(pipe.transformer).config.max_warmup_steps == 4


def test_one_transformer_where_there_could_be_two():
    pipe = pipeline("Wan22Pipeline", transformer=WanTransformer3DModel(), transformer_2=None)
    pipe.names = ["transformer"]
    backend = CacheDiTBackend()
    backend.enable(pipe)
    serve(backend, pipe, 8)
    assert counts(pipe.transformer) == {"uncond": 8, "cond": 8}


def test_several_block_lists():
    pipe = pipeline("FluxPipeline", guided=False, transformer=FluxTransformer2DModel())
    calls = []
    pipe.transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    backend = CacheDiTBackend()
    backend.enable(pipe)
    serve(backend, pipe, 8)
    stats = stats_of(pipe.transformer)
    assert stats.blocks == "transformer_blocks+single_transformer_blocks"  # one decision for both
    assert len(stats.cached_steps) == 8 - len(calls) >= 3  # a reused step skips the second list whole
    assert counts(pipe.transformer) == {"default": 8}


def test_settings_per_block_list():
    row = Denoiser(
        blocks={"transformer_blocks": ForwardPattern.Pattern_1, "single_transformer_blocks": ForwardPattern.Pattern_1},
        modifiers=[{"Fn_compute_blocks": 2}, {"Fn_compute_blocks": 4}],
    )
    pipe = pipeline("SomePipeline", guided=False, transformer=FluxTransformer2DModel())
    enabler(row)(pipe, DiffusionCacheConfig())
    assert [s.config.Fn_compute_blocks for s in controller_of(pipe.transformer).settings] == [2, 4]


def bagel():
    path = Path(__file__).parents[3] / "examples" / "bagel_shape.py"
    spec = importlib.util.spec_from_file_location("bagel_shape", path)
    shape = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shape)

    class BagelPipeline(shape.Bagel):
        @torch.inference_mode()
        def __call__(self, steps, seed=0):
            latents = torch.randn(1, 16, shape.LATENT_DIM, generator=torch.Generator().manual_seed(seed))
            prompt = self.read([7, 42, 3])
            assert len(prompt.entries) == 6  # every layer has filled it
            for step in range(steps):
                latents = latents - self.velocity(latents, 1 - step / steps, prompt) / steps
            return latents

    torch.manual_seed(0)
    return BagelPipeline(depth=6).eval()


def test_a_language_model_backbone():
    pipe = bagel()
    baseline = pipe(20)
    backend = CacheDiTBackend()
    backend.enable(pipe)
    cached = serve(backend, pipe, 20)
    stats = stats_of(pipe.language_model.model)
    assert stats.blocks == "layers" and len(stats.cached_steps) > 5
    assert counts(pipe.language_model.model) == {"default": 21}  # the first read the prompt
    assert 0 < (cached - baseline).norm() / baseline.norm() < 0.2
    assert torch.equal(serve(backend, pipe, 20), cached)


def test_what_a_transformer_declares():
    declared = SimpleNamespace(
        block_forward_patterns={"blocks": SimpleNamespace(name="Pattern_2")},  # cache_dit's own enumeration
        has_separate_cfg=True,
        check_forward_pattern=True,
        cached_adapter_cls=None,
    )
    pipe = pipeline("NewPipeline", gen=WanTransformer3DModel())
    pipe._dit_modules = ["gen"]
    pipe.gen._cache_dit_adapter_config = declared
    backend = CacheDiTBackend()
    backend.enable(pipe)
    serve(backend, pipe, 6)
    assert counts(pipe.gen) == {"uncond": 6, "cond": 6}

    declared.cached_adapter_cls = type("BagelCachedAdapter", (), {})
    CacheDiTBackend().enable(pipe)
    declared.cached_adapter_cls = type("NewCachedAdapter", (), {})
    with pytest.raises(
        NotImplementedError, match=r"NewCachedAdapter changes how cache_dit runs blocks.*SensenovaCached"
    ):
        CacheDiTBackend().enable(pipe)


# Enablers


def test_every_row_names_patterns_and_paths():
    assert {"Wan22Pipeline", "FluxPipeline", "LongCatImagePipeline", "BagelPipeline"} <= vllm_omni.ENABLERS.keys()
    for rows in DENOISERS.values():
        assert len(rows) == 1 or [row.path for row in rows] == ["transformer", "transformer_2"]
        for row in rows:
            assert len(row.modifiers) in (0, 1, len(row.blocks))


@pytest.mark.parametrize("distilled", [True, False])
def test_guidance_as_the_checkpoint_has_it(distilled):
    row = Denoiser(blocks={"blocks": ForwardPattern.Pattern_2}, in_turn=lambda pipe: not pipe.is_distilled, paired=True)
    pipe = pipeline("SomePipeline", guided=not distilled, transformer=WanTransformer3DModel())
    pipe.is_distilled = distilled
    enabler(row)(pipe, DiffusionCacheConfig()).refresh(pipe, 6, False)
    pipe(6)
    assert counts(pipe.transformer) == ({"default": 6} if distilled else {"uncond": 6, "cond": 6})
    assert pipe._cache_dit_requires_paired_cfg is True


def test_an_enabler_of_ones_own(monkeypatch):
    monkeypatch.setattr(vllm_omni, "ENABLERS", dict(vllm_omni.ENABLERS))
    ours = register_enabler("OwnPipeline")(
        enabler(Denoiser("inner.model", {"blocks": ForwardPattern.Pattern_2}, in_turn=True))
    )
    assert vllm_omni.ENABLERS["OwnPipeline"] is ours
    pipe = pipeline("OwnPipeline")
    pipe.inner = SimpleNamespace(model=WanTransformer3DModel())
    backend = CacheDiTBackend()
    backend.enable(pipe)
    assert controller_of(pipe.inner.model) is not None


def test_nothing_is_enabled_where_it_does_not_fit():
    pipe = wan22()
    pipe.transformer_2 = QwenImageTransformer2DModel()  # has no list called blocks
    backend = CacheDiTBackend()
    with pytest.raises(ValueError, match="has no block list 'blocks'"):
        backend.enable(pipe)
    assert controller_of(pipe.transformer) is None and not backend.is_enabled()
    with pytest.raises(ValueError, match="pipeline: NoPipeline has no transformer at transformer"):
        backend.enable(pipeline("NoPipeline"))


# TeaCache


def test_teacache():
    pipe = pipeline("FluxPipeline", guided=False, transformer=FluxTransformer2DModel())
    baseline = pipe(12)
    assert TeaCacheBackend().config.rel_l1_thresh == TeaCacheBackend({}).config.rel_l1_thresh == 0.2
    assert TeaCacheBackend({"rel_l1_thresh": 0.4}).config.rel_l1_thresh == 0.4
    backend = TeaCacheBackend(rel_l1_thresh=0.6)
    backend.enable(pipe)
    config = controller_of(pipe.transformer).config
    assert config.cache_type is CacheType.TeaCache and config.rel_l1_thresh == 0.6
    cached = serve(backend, pipe, 12)
    stats = stats_of(pipe.transformer)
    assert 0 < len(stats.cached_steps) < 11 and 11 not in stats.cached_steps  # the last step is known to be
    assert 0 < (cached - baseline).abs().max() < 0.2
    backend.disable(pipe)
    assert torch.equal(pipe(12), baseline)


def test_teacache_on_what_it_does_not_know():
    pipe = pipeline("Wan22Pipeline", transformer=WanTransformer3DModel())
    with pytest.raises(ValueError, match="none are the default for WanTransformer3DModel with this config"):
        TeaCacheBackend().enable(pipe)
    assert controller_of(pipe.transformer) is None


# The calls of vLLM-Omni's own module, under the alias


@pytest.fixture
def cache_dit():
    alias.install(override=True)
    yield importlib.import_module("cache_dit")
    alias.uninstall()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("cache_dit", "BlockAdapter CalibratorConfig DBCacheConfig ForwardPattern ParamsModifier steps_mask summary"),
        ("cache_dit.caching.block_adapters", "FakeDiffusionPipeline"),
        ("cache_dit.caching.cache_adapters.cache_adapter", "CachedAdapter"),
        ("cache_dit.caching.cache_blocks.pattern_0_1_2", "CachedBlocks_Pattern_0_1_2"),
        ("cache_dit.caching.cache_blocks.pattern_3_4_5", "CachedBlocks_Pattern_3_4_5"),
        ("cache_dit.caching.cache_contexts", "BasicCacheConfig"),
        ("cache_dit.caching.cache_contexts.cache_manager", "CachedContextManager"),
    ],
)
def test_what_its_module_imports(cache_dit, module, names):
    for name in names.split():
        assert getattr(importlib.import_module(module), name).__module__.startswith("cachedit.")


def db_cache_config(cache_dit, **changes):
    fields = ("Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps", "max_cached_steps")
    fields += ("max_continuous_cached_steps", "residual_diff_threshold", "num_inference_steps")
    return cache_dit.DBCacheConfig(**{name: GUIDE[name] for name in fields} | changes)


def test_its_calls_for_two_transformers(cache_dit):
    pipe = wan22()
    first = cache_dit.DBCacheConfig().reset(max_warmup_steps=4, max_cached_steps=-1)
    second = cache_dit.DBCacheConfig().reset(max_warmup_steps=2, max_cached_steps=20)
    adapter = cache_dit.BlockAdapter(
        transformer=[pipe.transformer, pipe.transformer_2],
        blocks=[pipe.transformer.blocks, pipe.transformer_2.blocks],
        forward_pattern=[cache_dit.ForwardPattern.Pattern_2] * 2,
        params_modifiers=[cache_dit.ParamsModifier(cache_config=config) for config in (first, second)],
        has_separate_cfg=True,
    )
    cache_dit.enable_cache(adapter, cache_config=db_cache_config(cache_dit))
    backend = CacheDiTBackend()
    ours = wan22()
    for transformer in ("transformer", "transformer_2"):
        getattr(ours, transformer).load_state_dict(getattr(pipe, transformer).state_dict())
    backend.enable(ours)
    for steps in (1, 10):
        high, low = (1, 0) if steps == 1 else (6, 4)
        cache_dit.refresh_context(pipe.transformer, num_inference_steps=high, verbose=True)
        cache_dit.refresh_context(pipe.transformer_2, num_inference_steps=low, verbose=True)
        assert torch.equal(pipe(steps), serve(backend, ours, steps))  # both ways mean the same
    assert counts(pipe.transformer) == {"uncond": 6, "cond": 6}


def test_its_calls_for_several_lists_and_masks(cache_dit):
    pipe = pipeline("FluxPipeline", guided=False, transformer=FluxTransformer2DModel())
    config = db_cache_config(cache_dit)
    forecasts = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    adapter = cache_dit.BlockAdapter(
        transformer=pipe.transformer,
        blocks=[pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks],
        forward_pattern=[cache_dit.ForwardPattern.Pattern_1, cache_dit.ForwardPattern.Pattern_1],
        params_modifiers=[cache_dit.ParamsModifier(cache_config=config, calibrator_config=forecasts)],
    )
    cache_dit.enable_cache((adapter), cache_config=config)
    for steps in (28, 10):
        changed = cache_dit.DBCacheConfig().reset(
            num_inference_steps=steps,
            steps_computation_mask=cache_dit.steps_mask(mask_policy="fast", total_steps=steps),
            steps_computation_policy="dynamic",
        )
        cache_dit.refresh_context(pipe.transformer, cache_config=changed, verbose=True)
        pipe(steps)
        (stats,) = cache_dit.summary(pipe.transformer, details=True)
        mask = cachedit.steps_mask(mask_policy="fast", total_steps=steps)
        assert stats.cached_steps and all(mask[step] == 0 for step in stats.cached_steps)
    assert controller_of(pipe.transformer).settings[0].calibrator_config == forecasts


def test_its_calls_for_bagel(cache_dit):
    """It has an adapter, blocks and a context manager of its own, which keep key-value caches out of arithmetic."""
    adapters = importlib.import_module("cache_dit.caching.cache_adapters.cache_adapter")
    blocks = importlib.import_module("cache_dit.caching.cache_blocks.pattern_0_1_2")
    managers = importlib.import_module("cache_dit.caching.cache_contexts.cache_manager")

    class BagelCachedContextManager(managers.CachedContextManager):
        def apply_cache(self, hidden_states, encoder_hidden_states=None, prefix="Bn", encoder_prefix="Bn_encoder"):
            raise AssertionError("not needed")

    class BagelCachedBlocks(blocks.CachedBlocks_Pattern_0_1_2):
        def call_Mn_blocks(self, hidden_states, encoder_hidden_states, *args, **kwargs):
            raise AssertionError("not needed")

    class BagelCachedAdapter(adapters.CachedAdapter):
        @classmethod
        def create_context(cls, block_adapter, **context_kwargs):
            raise AssertionError("not needed")

        @classmethod
        def collect_unified_blocks(cls, block_adapter, contexts_kwargs):
            raise AssertionError("not needed")

    pipe = bagel()
    transformer = pipe.language_model.model
    adapter = cache_dit.BlockAdapter(
        transformer=transformer, blocks=transformer.layers, forward_pattern=cache_dit.ForwardPattern.Pattern_0
    )
    BagelCachedAdapter.apply(adapter, cache_config=db_cache_config(cache_dit), calibrator_config=None)
    cache_dit.refresh_context(transformer, num_inference_steps=20, verbose=True)
    calls = []
    transformer.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    cached = pipe(20)
    assert 5 <= len(calls) < 16
    baseline = bagel()(20)
    assert 0 < (cached - baseline).norm() / baseline.norm() < 0.2


def test_the_page(monkeypatch):
    """The Python in docs/vllm-omni.md runs, and its numbers are right."""
    page = (Path(__file__).parents[3] / "docs" / "vllm-omni.md").read_text()
    monkeypatch.setattr(vllm_omni, "ENABLERS", dict(vllm_omni.ENABLERS))
    assert f"By class name, {len(vllm_omni.ENABLERS)} of them" in page
    pipe = pipeline("QwenImagePipeline", transformer=QwenImageTransformer2DModel())
    scope = {"pipeline": pipe}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)
    assert scope["backend"].config.scm_steps_mask_policy == "fast" and not scope["backend"].is_enabled()
    assert "MyPipeline" in vllm_omni.ENABLERS
