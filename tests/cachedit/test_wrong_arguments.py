"""What a user may get wrong: errors name the argument, and leave everything as it was."""

import copy
import gc
import types

import pytest
import torch
from torch import nn

import cachedit
from cachedit import (
    BlockAdapterRegister,
    CacheType,
    CalibratorConfig,
    DBCacheConfig,
    DBPruneConfig,
    ForwardPattern,
    ParallelismConfig,
    ParamsModifier,
    PatchFunctor,
    PolicyConfig,
    TaylorSeerCalibratorConfig,
)
from holds import both_kinds, enable, reused, reusing, traces
from toys import DualBlock, Shaped, Toy, call_flux, make_toy, run_toy, tiny_flux, tiny_flux_pipeline


class Slotted:
    __slots__ = ("__weakref__", "transformer")


@pytest.mark.parametrize(
    ("config", "calibrator", "error", "message"),
    [
        (reusing(cache_type="NONE"), None, ValueError, r"cache_type must be CacheType.DBCache .*, got 'NONE'"),
        (reusing(cache_type=CacheType.DBPrune), None, ValueError, "in a DBCacheConfig, got <CacheType.DBPrune"),
        (reusing(residual_diff_threshold="0.1"), None, TypeError, "threshold must be a number, got '0.1'"),
        (reusing(residual_diff_threshold=True), None, TypeError, "residual_diff_threshold must be a number, got True"),
        (reusing(enable_separate_cfg="yes"), None, TypeError, "enable_separate_cfg must be True or False, got 'yes'"),
        (reusing(cfg_compute_first="no"), None, TypeError, "cfg_compute_first must be True or False, got 'no'"),
        (reusing(cfg_diff_compute_separate=1), None, TypeError, "compute_separate must be True or False, got 1"),
        (
            reusing(DBPruneConfig, force_reduce_calibrator_vram="x"), None,
            TypeError, "force_reduce_calibrator_vram must be True or False, got 'x'",
        ),
        (
            reusing(DBPruneConfig, enable_dynamic_prune_threshold=None), None,
            TypeError, "enable_dynamic_prune_threshold must be True or False, got None",
        ),
        (
            reusing(), TaylorSeerCalibratorConfig(enable_calibrator="x"),
            TypeError, "enable_calibrator must be True or False, got 'x'",
        ),
        (
            reusing(), TaylorSeerCalibratorConfig(calibrator_type="dmd"),
            ValueError, "calibrator_type must be 'taylorseer' in a TaylorSeerCalibratorConfig, got 'dmd'",
        ),
        (
            reusing(), CalibratorConfig(enable_calibrator=True),
            ValueError, "enable_calibrator: a CalibratorConfig forecasts nothing",
        ),
    ],
)  # fmt: skip
def test_configurations(config, calibrator, error, message):
    model = make_toy()
    before = traces(model)
    with pytest.raises(error, match=message):
        enable(model, config, calibrator)
    assert traces(model) == before


def test_a_misspelt_field_is_told_its_name():
    with pytest.raises(TypeError, match="no field 'Fn_compute_block'; did you mean Fn_compute_blocks"):
        DBCacheConfig().update(Fn_compute_block=1)
    with pytest.raises(TypeError, match="no field 'zzz'; fields are Bn_compute_blocks, "):
        ParamsModifier(zzz=4)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"pipe": 3}, TypeError, "pipe must be an object like a diffusers pipeline, got int"),
        ({"pipe": types.SimpleNamespace()}, TypeError, "pipe must be .* got SimpleNamespace"),
        ({"pipe": Slotted()}, TypeError, "pipe must be .* got Slotted"),
        ({"transformer": []}, ValueError, "transformer must not be an empty list"),
        ({"blocks_name": 3}, TypeError, r"blocks_name\[0\] must be a text, got 3"),
        ({"has_separate_cfg": "x"}, TypeError, "has_separate_cfg must be True or False, got 'x'"),
        ({"linked": "x"}, TypeError, "linked must be True, False or None, got 'x'"),
        ({"check_forward_pattern": 0}, TypeError, "check_forward_pattern must be True, False or None, got 0"),
        # of a text, every letter would be a prefix
        ({"allow_prefixes": "blocks"}, TypeError, "allow_prefixes must be a list of texts, got 'blocks'"),
        ({"allow_suffixes": None}, TypeError, "allow_suffixes must be a list of texts, got None"),
    ],
)
def test_fields_of_an_adapter(fields, error, message):
    model = make_toy()
    before = traces(model)
    with pytest.raises(error, match=message):
        enable(model, reusing(), **fields)
    assert traces(model) == before


def test_a_transformer_given_twice():
    model = make_toy()
    with pytest.raises(ValueError, match="transformer: a transformer is given twice"):
        enable(model, reusing(), transformer=[model, model], blocks=[model.blocks] * 2)


def test_a_block_list_of_another_kind():
    traced = torch.jit.trace(nn.ModuleDict({"a": nn.Linear(2, 2)})["a"], torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"blocks\[0\] must be a torch.nn.ModuleList, got TopLevelTracedModule"):
        enable(make_toy(), reusing(), blocks=traced)


@pytest.mark.parametrize(
    ("arguments", "changes", "error", "message"),
    [
        (({"Fn_compute_blocks": 1},), {}, TypeError, "cache_config must be a DBCacheConfig, got dict"),
        ((28,), {}, TypeError, "cache_config must be a DBCacheConfig, got int"),
        ((TaylorSeerCalibratorConfig(),), {}, TypeError, "cache_config must be .* got TaylorSeerCalibratorConfig"),
        ((), {"cache_type": CacheType.NONE}, ValueError, "cache_type must not be NONE in a refresh: disable_cache"),
        ((), {"enable_separate_cfg": "x"}, TypeError, "enable_separate_cfg must be True or False, got 'x'"),
    ],
)
def test_refreshes(arguments, changes, error, message):
    model = enable(make_toy(), reusing())
    run_toy(model, 4)
    with pytest.raises(error, match=message):
        cachedit.refresh_context(model, *arguments, **changes)
    assert reused(model) == [[2, 3]]
    assert cachedit.summary(model, logging=False)[0].cache_options["cache_config"] == reusing()


def test_one_list_cannot_be_disabled():
    model = make_toy()
    modifier = ParamsModifier(cache_config=DBCacheConfig().reset(cache_type=CacheType.NONE))
    with pytest.raises(ValueError, match="params_modifiers: cache_type NONE is for all block lists"):
        enable(model, reusing(), params_modifiers=modifier)


@pytest.mark.parametrize("policy", [lambda: None, object])
def test_policies_that_are_none(policy):
    model = enable(make_toy(), PolicyConfig(Fn_compute_blocks=1, policy=policy))
    with pytest.raises(TypeError, match="policy must make a StepPolicy, with a method decide, got"):
        run_toy(model, 1)


def test_counts_that_are_no_numbers():
    model = enable(make_toy(), reusing())
    with pytest.raises(ValueError, match="max_requests must be an integer of at least 1, got True"):
        cachedit.limit_requests(model, True)
    with pytest.raises(ValueError, match="max_bytes must be an integer of at least 1, got True"):
        cachedit.limit_requests(model, 2, True)
    with (
        pytest.raises(ValueError, match="num_inference_steps must be an integer of at least 1, got True"),
        cachedit.request(model, "key", True),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"compute_bins": 3, "cache_bins": 4}, TypeError, "compute_bins must be a sequence of integers, got int"),
        (
            {"compute_bins": [3], "cache_bins": iter([4])},
            TypeError,
            "cache_bins must be a sequence .*, got list_iterator",
        ),
        ({"compute_bins": "31", "cache_bins": "2"}, TypeError, "compute_bins must be a sequence of integers, got str"),
        (
            {"total_steps": 8, "mask_policy": ["fast"]},
            ValueError,
            r"mask_policy must be one of slow, .*, got \['fast'\]",
        ),
    ],
)
def test_masks(arguments, error, message):
    with pytest.raises(error, match=message):
        cachedit.steps_mask(**arguments)


@pytest.mark.parametrize("function", [cachedit.strify, cachedit.plot_summary])
def test_lists_of_something_else_than_statistics(function):
    with pytest.raises(TypeError, match="must hold what summary returned, got Toy"):
        function([make_toy()])


def test_registrations_that_would_spoil_all_others():
    for name in (3, None, "", ["x"]):  # an empty one would serve every class
        with pytest.raises(TypeError, match="name must be the beginning of a class name, got"):
            BlockAdapterRegister.register(name)
    with pytest.raises(TypeError, match="what is registered for 'Mine' must be a function, got 3"):
        BlockAdapterRegister.register("Mine")(3)
    assert not BlockAdapterRegister.is_supported(make_toy())


def test_a_functor_wants_a_module():
    with pytest.raises(TypeError, match=r"transformer must be a torch.nn.Module, got NoneType"):
        PatchFunctor().apply(None)


@pytest.mark.parametrize("name", ["parallel_kwargs", "extra_parallel_kwargs", "cp_plan", "attention_backend"])
def test_fields_of_parallelism(name):
    with pytest.raises(TypeError, match=f"{name} must be a .*, got 3"):
        ParallelismConfig(**{name: 3}).validate()


class TestWrappers:
    """torch's wrappers for several devices are looked through, as the compiler's is."""

    def test_the_class_within_is_looked_up(self):
        model = tiny_flux()
        cachedit.enable_cache(nn.DataParallel(model), reusing())
        sections = [entry.blocks for entry in cachedit.summary(model, logging=False)]
        assert sections == ["transformer_blocks+single_transformer_blocks"]

    def test_wrapped_afterwards(self):
        model = make_toy()
        before = traces(model)
        wrapper = nn.DataParallel(enable(model, reusing()))
        run_toy(wrapper, 4)
        assert reused(wrapper) == reused(model) == [[2, 3]]
        cachedit.disable_cache(wrapper)
        assert traces(model) == before


class TestShallowCopies:
    """copy.copy(pipe) takes along what enabling put on the pipeline."""

    def test_that_outlive_their_original(self):
        pipe = tiny_flux_pipeline()
        cachedit.enable_cache(pipe, reusing())
        expected = call_flux(pipe, 5)
        other = copy.copy(pipe)
        del pipe
        gc.collect()
        with pytest.raises(
            RuntimeError, match="is gone, and this is a shallow copy of it: call enable_cache on the copy"
        ):
            call_flux(other, 5)
        cachedit.enable_cache(other, reusing())
        assert torch.equal(call_flux(other, 5), expected) and reused(other) == [[2, 3, 4]]

    def test_are_rid_of_it_when_they_are_disabled(self):
        pipe = tiny_flux_pipeline()
        plain = set(vars(pipe))
        cachedit.enable_cache(pipe, reusing())
        other = copy.copy(pipe)
        cachedit.disable_cache(other)
        assert set(vars(other)) == plain


class TestLoops:
    """What a loop over a described list may do, and what it may not."""

    @both_kinds
    def test_a_list_that_is_run_through_twice(self, kind):
        model = Shaped("twice").requires_grad_(False)
        model.pattern = ForwardPattern.Pattern_3
        enable(model, reusing(kind))
        with pytest.raises(ValueError, match="blocks: blocks is run through twice in one forward"):
            run_toy(model, 1)

    @both_kinds
    def test_blocks_are_what_they_are(self, kind):
        """Also on reused steps, where something else stands in for them."""
        seen = []

        class Asking(Toy):
            def forward(self, hidden_states, encoder_hidden_states, timestep):
                streams = hidden_states, encoder_hidden_states
                for block in self.blocks:
                    seen.append(isinstance(block, DualBlock))
                    streams = block(*streams)
                return sum(stream.mean() for stream in streams)

        model = make_toy()
        model.__class__ = Asking
        enable(model, reusing(kind))
        run_toy(model, 4)
        assert reused(model) == [[2, 3]]
        assert seen == [True] * 24
