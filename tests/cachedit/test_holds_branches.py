"""Guidance branches: any number of them, skipped passes, call order, borrowed differences."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, DBPruneConfig, ForwardPattern, TaylorSeerCalibratorConfig
from cachedit.controller import controller_of
from holds import both_kinds, enable, reused, reusing, same, static
from toys import make_toy, run_toy, toy_inputs

MASK = [1, 1, 0, 0, 1, 0, 0, 1, 0, 0]


class Line(nn.Module):
    """A block whose residual is a straight line in time, so that a forecast of order 1 is exact."""

    def forward(self, hidden_states, temb):
        return hidden_states + temb * hidden_states.new_tensor([1.0, -2.0])


class Lines(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(Line() for _ in range(depth))

    def forward(self, time):
        hidden = torch.zeros(1, 3, 2)
        for block in self.blocks:
            hidden = block(hidden, torch.tensor(1.0 + time))
        return hidden


class Pipeline:
    """A pipeline whose scheduler tells where it is, as most of diffusers' do."""

    def __init__(self, model):
        self.transformer = model
        self.scheduler = SimpleNamespace(step_index=None, timesteps=None)


def lines(config, pipe=None, **adapter):
    model = Lines() if pipe is None else pipe.transformer
    adapter = BlockAdapter(
        pipe=pipe, transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_3, **adapter
    )
    cachedit.enable_cache(adapter, config, TaylorSeerCalibratorConfig())
    return model


def stats(model):
    return cachedit.summary(model, logging=False)[0]


def on(model, branch):
    """What ``transformer.cache_context(branch)`` of a diffusers model does."""
    return controller_of(model).cache_context(branch)


def steps_of(model, branch, reused=True):
    return [record.step for record in stats(model).branches[branch].records if record.reused is reused]


class TestNamedBranches:
    @both_kinds
    @pytest.mark.parametrize("names", [["cond", "uncond"], ["uncond", "cond"], ["pred_cond", "pred_uncond", "skip"]])
    def test_each_gives_what_it_gives_alone(self, kind, names):
        model = enable(make_toy(), reusing(kind, num_inference_steps=6), TaylorSeerCalibratorConfig())
        for _ in range(2):
            outputs = {name: [] for name in names}
            with torch.no_grad():
                for step in range(6):
                    for seed, name in enumerate(names):
                        with on(model, name):
                            outputs[name].append(model(**toy_inputs(step, 6, seed=seed)))
            assert list(stats(model).branches) == names
        for seed, name in enumerate(names):
            lone = enable(make_toy(), reusing(kind), TaylorSeerCalibratorConfig())
            assert same(run_toy(lone, 6, seed=seed), outputs[name])

    def test_names_end_with_their_context(self):
        model = enable(make_toy(), reusing())
        with on(model, "cond"):
            with on(model, "uncond"):
                run_toy(model, 1)
            run_toy(model, 1)
        run_toy(model, 1)
        assert list(stats(model).branches) == ["uncond", "cond", "default"]

    def test_batched_guidance_is_one_branch(self):
        model = enable(make_toy(), reusing())
        run_toy(model, 6, batch=2)
        assert list(stats(model).branches) == ["default"] and reused(model) == [[2, 3, 4, 5]]


def run_interval(model, interval, total=10, first="cond", scheduler=None):
    """Guidance limited to an interval: outside of it there is no unconditional pass."""
    if scheduler is not None:
        scheduler.step_index = None
    outputs = {"cond": [], "uncond": []}
    names = ["cond", "uncond"] if first == "cond" else ["uncond", "cond"]
    with torch.no_grad():
        for step in range(total):
            for name in names:
                if name == "cond" or step in interval:
                    with on(model, name):
                        outputs[name].append(model(step))
            if scheduler is not None:
                scheduler.step_index = step + 1
    return outputs


class TestSkippedPasses:
    """Steps are the request's: a branch that skips some finds masks, warm-up and distances where they were."""

    @both_kinds
    @pytest.mark.parametrize("interval", [range(3, 8), range(6), [0, 1, 2, 7, 8, 9], [4, 6, 8]], ids=str)
    def test_masks_hold_at_the_request_s_steps(self, kind, interval):
        model = lines(static(MASK, kind, num_inference_steps=10))
        for _ in range(2):  # and the next request begins with its first step
            run_interval(model, interval)
            first = next(iter(interval))
            assert steps_of(model, "cond") == [i for i in range(10) if not MASK[i]]
            assert steps_of(model, "uncond") == [i for i in interval if i != first and not MASK[i]]
            assert steps_of(model, "uncond", False) == [i for i in interval if i == first or MASK[i]]

    def test_the_pass_that_is_skipped_may_be_the_first_of_a_step(self):
        model = lines(static(MASK, num_inference_steps=10))
        for _ in range(2):
            run_interval(model, [0, 1, 5, 6, 8], first="uncond")
            assert steps_of(model, "cond") == [i for i in range(10) if not MASK[i]]
            assert steps_of(model, "uncond") == [5, 6, 8]

    @pytest.mark.parametrize("between", [[], [range(0)]], ids=["at once", "after one without guidance"])
    def test_the_order_may_be_another_in_the_next_request(self, between):
        model = lines(static(MASK, num_inference_steps=10))
        run_interval(model, range(10), first="uncond")
        for interval in between:
            run_interval(model, interval)
        run_interval(model, range(10), first="cond")
        for name in ("cond", "uncond"):
            assert steps_of(model, name) == [i for i in range(10) if not MASK[i]]

    @pytest.mark.parametrize("first", ["cond", "uncond"])
    def test_a_scheduler_that_tells_is_believed(self, first):
        """Without it, a pass that is new and comes first would be taken to belong to the step before."""
        pipe = Pipeline(Lines())
        model = lines(static(MASK, num_inference_steps=10), pipe)
        for _ in range(2):
            run_interval(model, range(4, 9), first=first, scheduler=pipe.scheduler)
            assert steps_of(model, "cond") == [i for i in range(10) if not MASK[i]]
            assert steps_of(model, "uncond") == [5, 6, 8]

    @both_kinds
    def test_forecasts_span_the_steps_that_were_skipped(self, kind):
        """Computed at 0, 1 and 4, reused at 5 and 8: exact only if the distances are right."""
        model, plain = lines(static(MASK, kind)), Lines()
        interval = [0, 1, 4, 5, 8]
        outputs = run_interval(model, interval)
        for step, output in zip(interval, outputs["uncond"], strict=True):
            torch.testing.assert_close(output, plain(step))
        for step, output in enumerate(outputs["cond"]):
            torch.testing.assert_close(output, plain(step))
        assert steps_of(model, "uncond") == [5, 8]

    def test_warm_up_is_the_request_s(self):
        model = lines(reusing(max_warmup_steps=5, num_inference_steps=10))
        run_interval(model, range(3, 8))
        assert steps_of(model, "uncond") == [5, 6, 7]
        model = lines(reusing(max_warmup_steps=2, num_inference_steps=10))
        run_interval(model, range(3, 8))
        assert steps_of(model, "uncond") == [4, 5, 6, 7]

    @pytest.mark.parametrize(("policy", "computed"), [("once", [0, 6]), ("repeat", [0, 6, 8])])
    def test_a_refresh_that_falls_on_a_skipped_step_is_made_up_for(self, policy, computed):
        config = reusing(max_warmup_steps=1, force_refresh_step_hint=4, force_refresh_step_policy=policy)
        model = lines(config)
        run_interval(model, [0, 1, 2, 3, 6, 7, 8, 9])
        assert steps_of(model, "uncond", reused=False) == computed

    def test_a_branch_that_a_request_does_without_gives_its_buffers_back(self):
        model = lines(reusing(num_inference_steps=10))
        run_interval(model, range(10))
        both = stats(model).bytes_held
        run_interval(model, [])
        run_interval(model, [])
        assert list(stats(model).branches) == ["cond"]
        assert controller_of(model).requests.latest.count_bytes() == both // 2


class Counted:
    """Counts the calls of a function."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


class TestBorrowedDifferences:
    """``cfg_diff_compute_separate=False``: the branch that comes first measures for all."""

    def run(self, model, total=8, skip=()):
        with torch.no_grad():
            for step in range(total):
                for seed, name in enumerate(("cond", "uncond")):
                    if (step, name) not in skip:
                        with on(model, name):
                            model(**toy_inputs(step, total, seed=seed))
        return {name: branch.records for name, branch in stats(model).branches.items()}

    @pytest.mark.parametrize("separate", [True, False])
    def test_measured_once_and_decided_alike(self, separate, monkeypatch):
        import cachedit_kernels

        counted = Counted(cachedit_kernels.residual_l1)
        monkeypatch.setattr(cachedit_kernels, "residual_l1", counted)
        config = {"residual_diff_threshold": 0.1, "max_continuous_cached_steps": 2, "num_inference_steps": 8}
        model = enable(make_toy(), reusing(cfg_diff_compute_separate=separate, **config))
        for _ in range(2):
            counted.calls = 0
            branches = self.run(model)
            measured = {name: [r.diff for r in records if r.diff is not None] for name, records in branches.items()}
            assert counted.calls == len(measured["cond"]) + (len(measured["uncond"]) if separate else 0) > 0
            assert (measured["cond"] == measured["uncond"]) is not separate
            if not separate:
                assert steps_of(model, "cond") == steps_of(model, "uncond") != []

    def test_a_step_that_the_first_branch_skips_is_computed(self):
        model = enable(make_toy(), reusing(cfg_diff_compute_separate=False, num_inference_steps=8))
        for _ in range(2):
            branches = self.run(model, skip={(5, "cond")})
            assert steps_of(model, "uncond") == [2, 3, 4, 6, 7]
            assert branches["uncond"][5].reason == "not measured"

    def test_no_anchor_is_held_for_it(self):
        held = {}
        for separate in (True, False):
            model = enable(make_toy(), reusing(cfg_diff_compute_separate=separate))
            self.run(model)
            held[separate] = stats(model).bytes_held
        assert held[True] - held[False] == toy_inputs(0, 1)["hidden_states"].nbytes

    def test_pruning_measures_each_branch(self):
        """Blocks are measured by their own inputs, of which another branch has none."""
        model = enable(make_toy(), reusing(DBPruneConfig, cfg_diff_compute_separate=False))
        branches = self.run(model)
        assert [r.diff for r in branches["cond"]] != [r.diff for r in branches["uncond"]]


class TestByCallOrder:
    @both_kinds
    @pytest.mark.parametrize("first", [False, True])
    def test_equals_named_branches(self, kind, first):
        fields = {"num_inference_steps": 5, "enable_separate_cfg": True, "cfg_compute_first": first}
        model = enable(make_toy(), reusing(kind, **fields), TaylorSeerCalibratorConfig())
        for _ in range(2):
            with torch.no_grad():
                outputs = [model(**toy_inputs(step, 5, seed=seed)) for step in range(5) for seed in (1, 2)]
        assert list(stats(model).branches) == (["uncond", "cond"] if first else ["cond", "uncond"])
        for seed in (1, 2):
            lone = enable(make_toy(), reusing(kind), TaylorSeerCalibratorConfig())
            assert same(outputs[seed - 1 :: 2], run_toy(lone, 5, seed=seed))

    def test_passes_of_one_step_are_told_by_the_scheduler(self):
        """With guidance off on some steps, every second call is no longer the unconditional one."""
        pipe = Pipeline(Lines())
        model = lines(static(MASK, num_inference_steps=10), pipe, has_separate_cfg=True)
        for _ in range(2):
            pipe.scheduler.step_index = None
            for step in range(10):
                for _ in range(2 if step < 6 else 1):
                    model(step)
                pipe.scheduler.step_index = step + 1
            assert steps_of(model, "cond") == [i for i in range(10) if not MASK[i]]
            assert steps_of(model, "uncond") == [i for i in range(6) if not MASK[i]]

    def test_a_second_call_of_a_branch_is_another_step_whatever_the_scheduler_says(self):
        pipe = Pipeline(Lines())
        model = lines(reusing(num_inference_steps=8), pipe)
        for step in range(8):
            pipe.scheduler.step_index = step // 2
            model(step)
        assert steps_of(model, "default") == [2, 3, 4, 5, 6, 7]

    def test_the_configuration_goes_before_the_adapter(self):
        model = make_toy()
        enable(model, reusing(enable_separate_cfg=False), has_separate_cfg=True)
        run_toy(model, 4)
        assert list(stats(model).branches) == ["default"]

    def test_names_go_before_both(self):
        model = enable(make_toy(), DBCacheConfig(Fn_compute_blocks=1, enable_separate_cfg=True))
        with on(model, "pred"):
            run_toy(model, 4)
        assert list(stats(model).branches) == ["pred"]
