"""Several transformers, several block lists, and settings of their own for each."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import cachedit
from cachedit import (
    BlockAdapter,
    DBCacheConfig,
    DBPruneConfig,
    FoCaCalibratorConfig,
    ForwardPattern,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
)
from holds import both_kinds, reused, reusing, same, static, traces
from toys import DIM, DualBlock, toy_inputs

P1 = ForwardPattern.Pattern_1


class Pair(nn.Module):
    """Two block lists, one after the other on the same streams."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.project = nn.Linear(DIM, DIM)
        self.first = nn.ModuleList(DualBlock(P1) for _ in range(3))
        self.second = nn.ModuleList(DualBlock(P1) for _ in range(4))
        self.calls = Counter()
        for name in ("first", "second"):
            for i, block in enumerate(getattr(self, name)):
                block.register_forward_pre_hook(lambda *_, key=f"{name}[{i}]": self.calls.update([key]))
        self.eval().requires_grad_(False)

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        hidden, encoder = self.project(hidden_states), encoder_hidden_states
        for blocks in (self.first, self.second):
            for block in blocks:
                encoder, hidden = block(hidden, encoder, torch.sin(timestep).reshape(-1, 1, 1))
        return hidden + encoder.mean(1, keepdim=True)


def lists(model):
    return [model.first, model.second]


def adapter_for(model, **fields):
    return BlockAdapter(transformer=model, blocks=lists(model), forward_pattern=P1, **fields)


def run(model, steps=8, seed=1, total=8):
    with torch.no_grad():
        return [model(**toy_inputs(step, total, seed=seed)) for step in range(steps)]


def stats(model):
    return cachedit.summary(model, logging=False)


class TestLinkedLists:
    @both_kinds
    def test_a_reused_step_skips_later_lists_whole(self, kind):
        model = Pair()
        mask = [1, 1, 0, 0, 1, 0, 0, 0]
        cachedit.enable_cache(adapter_for(model, linked=True), static(mask, kind))
        run(model)
        (entry,) = stats(model)
        assert entry.blocks == "first+second" and entry.cached_steps == [2, 3, 5, 6, 7]
        assert model.calls.pop("first[0]") == 8
        assert set(model.calls.values()) == {3} and len(model.calls) == 6

    def test_head_and_tail_may_reach_into_either_list(self):
        for Fn, Bn, computed in ((4, 1, {"first[0]", "first[1]", "first[2]", "second[0]", "second[3]"}),
                                 (1, 5, {"first[0]", "first[2]", *(f"second[{i}]" for i in range(4))}),
                                 (3, 0, {"first[0]", "first[1]", "first[2]"})):  # fmt: skip
            model = Pair()
            config = static([1, 0, 0, 0], Fn_compute_blocks=Fn, Bn_compute_blocks=Bn)
            cachedit.enable_cache(adapter_for(model, linked=True), config)
            run(model, 4)
            assert {key for key, count in model.calls.items() if count == 4} == computed

    @both_kinds
    def test_unlinked_lists_decide_separately(self, kind):
        model = Pair()
        cachedit.enable_cache(adapter_for(model), static([1, 0, 0, 1], kind))
        run(model, 4)
        assert [entry.blocks for entry in stats(model)] == ["first", "second"]
        assert model.calls["first[0]"] == model.calls["second[0]"] == 4  # each has a head of its own
        assert model.calls["first[1]"] == model.calls["second[3]"] == 2


class TestModifiers:
    def settings(self, model):
        return [
            (entry.cache_options["cache_config"], entry.cache_options["calibrator_config"]) for entry in stats(model)
        ]

    def enable(self, modifiers, linked=None, calibrator=None, config=None):
        model = Pair()
        cachedit.enable_cache(
            adapter_for(model, linked=linked), config or reusing(), calibrator, params_modifiers=modifiers
        )
        return model

    def test_cache_config_alone(self):
        model = self.enable(
            [ParamsModifier(DBCacheConfig().reset(max_warmup_steps=4)), ParamsModifier(max_cached_steps=1)]
        )
        run(model)
        assert reused(model) == [[4, 5, 6, 7], [2]]
        assert [config.Fn_compute_blocks for config, _ in self.settings(model)] == [1, 1]  # the rest is common

    def test_calibrator_alone(self):
        model = self.enable([None, ParamsModifier(calibrator_config=FoCaCalibratorConfig())])
        run(model)
        assert reused(model) == [[2, 3, 4, 5, 6, 7]] * 2
        stream = sum(toy_inputs(0, 1)[name].nbytes for name in ("hidden_states", "encoder_hidden_states"))
        anchor = toy_inputs(0, 1)["hidden_states"].nbytes
        assert [entry.bytes_held for entry in stats(model)] == [stream + anchor, 4 * stream + anchor]

    def test_both_and_one_for_all(self):
        modifier = ParamsModifier(
            DBCacheConfig().reset(max_warmup_steps=3), TaylorSeerCalibratorConfig(taylorseer_order=2)
        )
        for modifiers in (modifier, [modifier], [modifier, modifier]):
            model = self.enable(modifiers, calibrator=FoCaCalibratorConfig())
            assert [c.max_warmup_steps for c, _ in self.settings(model)] == [3, 3]
            assert [c.taylorseer_order for _, c in self.settings(model)] == [2, 2]

    def test_another_kind_for_one_list(self):
        pruning = DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=10.0)
        model = self.enable([None, ParamsModifier(pruning)])
        run(model)
        assert reused(model) == [[2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7]]
        pruned = [record.pruned for record in stats(model)[1].main.records]
        assert pruned == [0, 0, 0, 3, 3, 3, 3, 3]

    def test_single_fields_hold_for_either_kind(self):
        modifiers = [ParamsModifier(max_warmup_steps=4), ParamsModifier(DBCacheConfig().reset(max_cached_steps=1))]
        model = self.enable(modifiers, config=reusing(DBPruneConfig, non_prune_block_ids=[2]))
        run(model)
        assert reused(model) == [[4, 5, 6, 7], [2]]
        assert all(config.non_prune_block_ids == [2] for config, _ in self.settings(model))

    def test_the_user_s_objects_are_never_changed(self):
        config, calibrator = static([1, 1, 0, 0, 1, 0, 0, 0]), TaylorSeerCalibratorConfig()
        modifiers = [ParamsModifier(max_warmup_steps=4), ParamsModifier(calibrator_config=FoCaCalibratorConfig())]
        given = config, calibrator, modifiers
        before = copy.deepcopy(given)
        model = self.enable(modifiers, calibrator=calibrator, config=config)
        run(model)
        cachedit.refresh_context(model, num_inference_steps=8, max_warmup_steps=1)
        run(model)
        assert (config, calibrator) == before[:2]
        assert list(map(repr, modifiers)) == list(map(repr, before[2]))

    def test_nor_looked_at_again(self):
        modifier = ParamsModifier(steps_computation_mask=[1, 0, 1, 0])
        model = self.enable(modifier)
        modifier.cache_config.steps_computation_mask.append(7)
        modifier.cache_config.Fn_compute_blocks = 99
        run(model, 4, total=4)
        assert reused(model) == [[1, 3]] * 2

    @pytest.mark.parametrize(
        ("modifiers", "names"),
        [
            (None, ["first+second"]),
            (ParamsModifier(max_warmup_steps=3), ["first+second"]),
            ([None, ParamsModifier(max_warmup_steps=2)], ["first+second"]),  # that is what is set anyway
            ([None, ParamsModifier(max_warmup_steps=3)], ["first", "second"]),
            ([None, ParamsModifier(calibrator_config=FoCaCalibratorConfig())], ["first", "second"]),
        ],
        ids=["none", "one for all", "equal", "config differs", "calibrator differs"],
    )
    def test_linked_lists_that_differ_decide_separately(self, modifiers, names):
        model = self.enable(modifiers, linked=True)
        run(model)
        assert [entry.blocks for entry in stats(model)] == names

    @pytest.mark.parametrize("kind", [DBCacheConfig, DBPruneConfig])
    def test_a_list_that_is_too_short_for_common_settings_is_computed(self, kind):
        """As AuraFlow's four joint blocks are for the default of eight."""
        model = Pair()
        cachedit.enable_cache(adapter_for(model, linked=False), reusing(kind, Fn_compute_blocks=2, Bn_compute_blocks=2))
        with pytest.raises(ValueError, match=r"5 \(3 \+ 2\) is more than the 3 blocks of first"):
            cachedit.refresh_context(model, Fn_compute_blocks=3)
        cachedit.enable_cache(adapter_for(model, linked=False), reusing(kind, Fn_compute_blocks=3))
        model.calls.clear()
        run(model)
        assert [model.calls[f"first[{i}]"] for i in range(3)] == [8] * 3
        assert [model.calls[f"second[{i}]"] for i in range(4)] == [8, 8, 8, 2]

    @pytest.mark.parametrize(
        ("modifiers", "error", "message"),
        [
            ([None] * 3, ValueError, r"params_modifiers: expected one, or one per block list \(2\), got 3"),
            ([None, "x"], TypeError, "params_modifiers must hold ParamsModifier objects, got str"),
            ([None, ParamsModifier(Fn_compute_blocks=5)], ValueError, r"5 \(5 \+ 0\) is more than the 4 .* second"),
            ([ParamsModifier(Bn_compute_blocks=-1), None], ValueError, "Bn_compute_blocks must be at least 0"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, modifiers, error, message):
        model = Pair()
        before = traces(model)
        with pytest.raises(error, match=message):
            cachedit.enable_cache(adapter_for(model), reusing(), params_modifiers=modifiers)
        assert traces(model) == before


class Experts:
    """Two transformers as in Wan 2.2: the first makes the noisy steps, the second the others, each with guidance."""

    def __init__(self):
        self.models = [Pair(seed=0), Pair(seed=1)]

    def enable(self, *args, **kwargs):
        self.adapter = BlockAdapter(
            transformer=self.models,
            blocks=[lists(model) for model in self.models],
            forward_pattern=[[P1, P1], [P1, P1]],
            **{name: kwargs.pop(name) for name in ("has_separate_cfg", "linked") if name in kwargs},
        )
        return cachedit.enable_cache(self.adapter, *args, **kwargs)

    def run(self, total=10, boundary=4, seeds=(1,)):
        with torch.no_grad():
            return [
                self.models[step >= boundary](**toy_inputs(step, total, seed=seed))
                for step in range(total)
                for seed in seeds
            ]


class TestTwoTransformers:
    @both_kinds
    def test_each_counts_its_own_steps(self, kind):
        experts = Experts()
        masks = [[1, 1, 0, 0], [1, 0, 0, 1, 0, 0]]
        modifiers = [ParamsModifier(steps_computation_mask=mask, num_inference_steps=len(mask)) for mask in masks]
        experts.enable(static([1], kind), params_modifiers=modifiers, linked=True)
        first = experts.run()
        assert reused(experts.adapter) == [[2, 3], [1, 2, 4, 5]]
        assert same(experts.run(), first)
        assert reused(experts.adapter) == [[2, 3], [1, 2, 4, 5]]

    def test_modifiers_per_list_of_each(self):
        experts = Experts()
        modifiers = [[ParamsModifier(max_warmup_steps=i), None] for i in (1, 3)]
        experts.enable(reusing(), params_modifiers=modifiers)
        experts.run()
        assert reused(experts.adapter) == [[1, 2, 3], [2, 3], [3, 4, 5], [2, 3, 4, 5]]
        assert [entry.blocks for entry in stats(experts.adapter)] == ["first", "second"] * 2

    def test_branches_in_turn(self):
        experts, lone = Experts(), Experts()
        experts.enable(reusing(), TaylorSeerCalibratorConfig(), has_separate_cfg=True)
        outputs = experts.run(seeds=(1, 2))
        assert [list(entry.branches) for entry in stats(experts.adapter)] == [["cond", "uncond"]] * 4
        lone.enable(reusing(), TaylorSeerCalibratorConfig())
        for i, seed in enumerate((1, 2)):
            for model in lone.models:
                cachedit.refresh_context(model)
            assert same(outputs[i::2], lone.run(seeds=(seed,)))

    def test_refresh_and_disable_reach_both(self):
        experts = Experts()
        before = [traces(model) for model in experts.models]
        experts.enable(reusing())
        experts.run()
        cachedit.refresh_context(experts.adapter, max_warmup_steps=1)
        experts.run()
        assert reused(experts.adapter) == [[1, 2, 3]] * 2 + [[1, 2, 3, 4, 5]] * 2
        cachedit.disable_cache(experts.adapter)
        assert [traces(model) for model in experts.models] == before

    def test_what_does_not_fit_one_leaves_both(self):
        experts = Experts()
        before = [traces(model) for model in experts.models]
        with pytest.raises(ValueError, match=r"expected one entry per transformer \(2\), got 3"):
            experts.enable(reusing(), params_modifiers=[None] * 3)
        with pytest.raises(ValueError, match="Fn_compute_blocks"):
            experts.enable(reusing(), params_modifiers=[None, ParamsModifier(Fn_compute_blocks=7)])
        assert [traces(model) for model in experts.models] == before
