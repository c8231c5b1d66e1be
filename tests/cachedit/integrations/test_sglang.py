"""What SGLang imports from cache_dit, replaces in it and calls: under the alias, on stand-ins for its transformers."""

import importlib
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import cachedit
import omni
from cachedit import DBCacheConfig, alias
from cachedit.controller import controller_of
from cachedit.integrations.groups import decide_together
from engines import QwenImageTransformer2DModel, WanTransformer3DModel, denoise
from ranks import run_ranks

IMPORTS = {
    "cache_dit": "BlockAdapter DBCacheConfig ForwardPattern ParamsModifier TaylorSeerCalibratorConfig disable_cache "
    "enable_cache load_configs refresh_context steps_mask summary",
    "cache_dit.caching.block_adapters": "BlockAdapterRegister FakeDiffusionPipeline",
    "cache_dit.caching.cache_contexts": "cache_manager BasicCacheConfig",
    "cache_dit.caching.cache_contexts.cache_manager": "CachedContextManager",
    "cache_dit.parallelism": "ParallelismBackend ParallelismConfig",
    "cache_dit.distributed": "ParallelismBackend ParallelismConfig",
}


@pytest.fixture
def cache_dit():
    alias.install(override=True)
    yield importlib.import_module("cache_dit")
    alias.uninstall()


@pytest.mark.parametrize("module", IMPORTS)
def test_what_sglang_imports(cache_dit, module):
    for name in IMPORTS[module].split():
        scope = {}
        exec(f"from {module} import {name}", scope)
        assert scope[name].__module__.startswith("cachedit.") or scope[name] is sys.modules[f"{module}.{name}"]


def test_one_transformer(cache_dit):
    """Enabled on the first request, refreshed for the others; a mask is named, and its name passed as the policy."""
    model = QwenImageTransformer2DModel()
    baseline = denoise([model], 8)
    assert cache_dit.BlockAdapterRegister.is_supported(model)
    config = cache_dit.DBCacheConfig(
        num_inference_steps=8,
        Fn_compute_blocks=1,
        max_warmup_steps=4,
        residual_diff_threshold=0.24,
        max_continuous_cached_steps=3,
        steps_computation_mask=None,
        steps_computation_policy="dynamic",
    )
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=None, parallelism_config=None)
    cached = denoise([model], 8)
    (stats,) = cache_dit.summary(model, logging=False)
    assert {name: len(branch.records) for name, branch in stats.branches.items()} == {"cond": 8, "uncond": 8}
    assert stats.cached_steps == stats.cfg_cached_steps == [4, 5, 6]
    assert 0 < (cached - baseline).abs().max() < 0.1
    assert torch.equal(denoise([model], 8), cached)  # the next request, of which nobody told

    mask = cache_dit.steps_mask(mask_policy="medium", total_steps=10)
    changed = cache_dit.DBCacheConfig().reset(
        num_inference_steps=10, steps_computation_mask=mask, steps_computation_policy="medium"
    )
    cache_dit.refresh_context(model, cache_config=changed, verbose=False)
    denoise([model], 10)
    (stats,) = cache_dit.summary(model, logging=False)
    assert len(stats.cached_steps) > 0 and all(mask[step] == 0 for step in stats.cached_steps)
    cache_dit.disable_cache(model)
    assert torch.equal(denoise([model], 8), baseline)


def test_two_transformers(cache_dit):
    high, low = WanTransformer3DModel(), WanTransformer3DModel()
    modifiers = [
        cache_dit.ParamsModifier(
            cache_config=cache_dit.DBCacheConfig(
                num_inference_steps=steps, Fn_compute_blocks=1, max_warmup_steps=warmup, residual_diff_threshold=0.24
            ),
            calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
        )
        for steps, warmup, order in ((6, 3, 1), (6, 2, 2))
    ]
    adapter = cache_dit.BlockAdapter(
        transformer=[high, low],
        blocks=[high.blocks, low.blocks],
        blocks_name=None,
        forward_pattern=[cache_dit.ForwardPattern.Pattern_2] * 2,
        params_modifiers=modifiers,
        check_forward_pattern=True,
        check_num_outputs=False,
        has_separate_cfg=True,
    )
    cache_dit.enable_cache(adapter, parallelism_config=None)
    for _ in range(2):
        for model in (high, low):
            cache_dit.refresh_context(model, cache_config=DBCacheConfig().reset(num_inference_steps=6), verbose=False)
        denoise([high, low], 12)
    settings = [controller_of(model).settings[0] for model in (high, low)]
    assert [s.config.max_warmup_steps for s in settings] == [3, 2]
    assert [s.calibrator_config.taylorseer_order for s in settings] == [1, 2]
    for model, warmup in ((high, 3), (low, 2)):
        (stats,) = cache_dit.summary(model, logging=False)
        assert [len(branch.records) for branch in stats.branches.values()] == [6, 6]
        assert stats.cached_steps == list(range(warmup, 6))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", ["ErnieImageTransformer2DModel", "Krea2Transformer2DModel"])
def test_adapters_that_it_brings(cache_dit, name, guided):
    """Per request: SGLang says whether it is guided, keeps the adapter, and takes the cache off by it."""
    model = omni.transformer(name)
    assert cache_dit.BlockAdapterRegister.is_supported(model)
    type(model).__module__ = "sglang.multimodal_gen.runtime.models.dits"
    assert not cache_dit.BlockAdapterRegister.is_supported(model)
    baseline = denoise([model], 8, guided)
    ((blocks, _),) = model.lists.items()
    pattern = cache_dit.ForwardPattern.Pattern_3
    adapter = cache_dit.BlockAdapter(
        transformer=model, blocks=getattr(model, blocks), forward_pattern=pattern, has_separate_cfg=guided
    )
    config = cache_dit.DBCacheConfig(
        num_inference_steps=8, Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.24
    )
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=None, parallelism_config=None)
    model._sglang_cache_dit_adapter = adapter
    denoise([model], 8, guided)
    (stats,) = cache_dit.summary(model, logging=False)
    assert [len(branch.records) for branch in stats.branches.values()] == [8] * (1 + guided)
    assert stats.cached_steps
    cache_dit.disable_cache(model._sglang_cache_dit_adapter)
    assert torch.equal(denoise([model], 8, guided), baseline)


def test_two_transformers_that_are_not_guided(cache_dit):
    """Ideogram 4: names and blocks are both given, and the second transformer has no step in a request of one."""
    pair = [omni.transformer("Magi2TransformerBlock") for _ in range(2)]
    config = cache_dit.DBCacheConfig(
        num_inference_steps=6, Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.24
    )
    adapter = cache_dit.BlockAdapter(
        transformer=pair,
        blocks=[model.layers for model in pair],
        blocks_name=["layers", "layers"],
        forward_pattern=[cache_dit.ForwardPattern.Pattern_3] * 2,
        params_modifiers=[cache_dit.ParamsModifier(cache_config=config, calibrator_config=None)] * 2,
        check_forward_pattern=False,
        check_num_outputs=False,
        has_separate_cfg=False,
    )
    cache_dit.enable_cache(adapter, parallelism_config=None)
    for shares in ((1, 0), (6, 6)):
        for model, share in zip(pair, shares):
            changed = DBCacheConfig().reset(
                num_inference_steps=share, steps_computation_mask=None, steps_computation_policy=None
            )
            cache_dit.refresh_context(model, cache_config=changed, verbose=False)
        denoise(pair, sum(shares), guided=False, first=shares[0])
    for model in pair:
        (stats,) = cache_dit.summary(model, logging=False)
        assert stats.cached_steps == [2, 3, 4, 5]


def test_a_request_ends_its_marks(cache_dit):
    """On disabling, SGLang takes off what it has marked; the object with its groups has gone by then."""
    model = QwenImageTransformer2DModel()
    model._is_parallelized = True
    cache_dit.enable_cache(model, cache_config=DBCacheConfig(num_inference_steps=8, Fn_compute_blocks=1))
    model._context_manager._sglang_sp_group = None
    cache_dit.disable_cache(model)
    del model._is_parallelized
    assert not hasattr(model, "_context_manager")
    cache_dit.enable_cache(model, cache_config=DBCacheConfig(num_inference_steps=8, Fn_compute_blocks=1))
    assert not hasattr(model, "_context_manager")


def test_adapters_that_change_blocks(cache_dit):
    adapters = importlib.import_module("cache_dit.caching.cache_adapters.cache_adapter")

    class Same(adapters.CachedAdapter):
        """Changes nothing."""

    class Other(adapters.CachedAdapter):
        @classmethod
        def collect_unified_blocks(cls, block_adapter, contexts_kwargs):
            raise AssertionError

    model = QwenImageTransformer2DModel()
    with pytest.raises(
        NotImplementedError, match=r"^Other changes how cache_dit runs blocks, .* are known: BagelCachedAda"
    ):
        Other.apply(model, cache_config=DBCacheConfig(Fn_compute_blocks=1))
    assert controller_of(model) is None
    Same.apply(model, cache_config=DBCacheConfig(Fn_compute_blocks=1))
    assert controller_of(model) is not None
    with pytest.raises(NotImplementedError, match="CachedBlocks_Pattern_3_4_5: cachedit does not replace"):
        importlib.import_module("cache_dit.caching.cache_blocks.pattern_3_4_5").CachedBlocks_Pattern_3_4_5([])


# Parallelism that SGLang does by itself


class PerToken(nn.Module):
    """Tokens do not meet, so that each rank's piece is what it is in one process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def adapter_of(model):
    pattern = cachedit.ForwardPattern.Pattern_3
    return cachedit.BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=pattern)


@torch.inference_mode()
def steps_reused(model, piece):
    """One half of the tokens changes more and more slowly, the other in leaps at every third step."""
    torch.manual_seed(1)
    quiet, lively = torch.randn(2, 1, 4, 8)
    for step in range(12):
        tokens = torch.cat([quiet * (1 + 0.02 * step), lively * (1 + 0.9 * (step % 3 == 0))], 1)
        model(tokens[:, piece])
    (stats,) = cachedit.summary(model, logging=False)
    return stats.cached_steps


CONFIG = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.13, "num_inference_steps": 12}


def on_a_rank(way):
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(world)))
    model, piece = PerToken(), slice(4 * rank, 4 * rank + 4)
    if way == "sglang":
        alias.install(override=True)
        import cache_dit
        from cache_dit.caching.cache_contexts import cache_manager
        from cache_dit.parallelism import ParallelismBackend, ParallelismConfig

        original = cache_manager.CachedContextManager.similarity
        cache_manager.CachedContextManager.similarity = lambda *args, **kwargs: original(*args, **kwargs)
        model._is_parallelized = True
        model._parallelism_config = ParallelismConfig(backend=ParallelismBackend.AUTO, ulysses_size=world, ring_size=1)
        cache_dit.enable_cache(adapter_of(model), cache_config=DBCacheConfig(**CONFIG), parallelism_config=None)
        manager = model._context_manager
        manager._sglang_sp_group, manager._sglang_tp_group, manager._sglang_tp_sp_group = group, None, None
    else:
        cachedit.enable_cache(model if way == "learnt" else adapter_of(model), DBCacheConfig(**CONFIG))
        if way != "alone":
            decide_together(model, group)
    reused = steps_reused(model, piece)
    cachedit.disable_cache(model)
    return reused, hasattr(model, "_context_manager")


def test_ranks_decide_alike_on_blocks_that_are_learnt():
    model = cachedit.enable_cache(PerToken(), DBCacheConfig(**CONFIG))
    whole = steps_reused(model, slice(None))
    assert whole and run_ranks(on_a_rank, 2, "learnt") == [(whole, False)] * 2


def test_ranks_of_an_engine_decide_alike():
    model = cachedit.enable_cache(adapter_of(PerToken()), DBCacheConfig(**CONFIG)).transformer
    whole = steps_reused(model, slice(None))
    assert 2 < len(whole) < 11
    assert run_ranks(on_a_rank, 2, "sglang") == [(whole, False)] * 2
    assert run_ranks(on_a_rank, 2, "decide_together") == [(whole, False)] * 2
    (first, _), (second, _) = run_ranks(on_a_rank, 2, "alone")
    assert first != second  # or the above would show nothing


def test_the_group_of_both_counts_where_there_is_one():
    joined = []
    manager = importlib.import_module("cachedit.integrations.internals").CachedContextManager(joined.append)
    manager._sglang_sp_group, manager._sglang_tp_group, manager._sglang_tp_sp_group = "sp", "tp", "both"
    assert joined == ["sp", "sp", "both"]
    manager._sglang_sp_group = manager._sglang_tp_sp_group = None
    assert joined[-1] == "tp"


def test_decide_together_says_what_is_wrong():
    model = QwenImageTransformer2DModel()
    with pytest.raises(ValueError, match="target: the cache is not enabled on this QwenImageTransformer2DModel"):
        decide_together(model, None)
