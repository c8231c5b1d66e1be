import diffusers
import pytest
import torch
from torch import nn

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.models import DENOISERS, SEPARATE_CFG, find_transformers
from pipelines import BUILDERS, build


def enable(pipe, **kwargs):
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=10.0, **kwargs)
    return cachedit.enable_cache(pipe, config, TaylorSeerCalibratorConfig())


def steps_of(pipe):
    """Per transformer and branch, how many steps the request had."""
    return [[len(b.records) for b in stats.branches.values()] for stats in cachedit.summary(pipe, logging=False)]


class TestTables:
    @pytest.mark.parametrize("name", [*DENOISERS, *sorted(SEPARATE_CFG)])
    def test_names_are_pipelines(self, name):
        assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)

    def test_transformers_in_calling_order(self):
        pipe = build("WanPipeline + two transformers").pipe
        assert find_transformers(pipe) == [pipe.transformer, pipe.transformer_2]
        assert find_transformers(nn.Linear(1, 1)) == [] == find_transformers(None)


class TestRequests:
    """A new request and its true step count are noticed when it starts."""

    @pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.6, 6)])
    def test_image_to_image_runs_fewer_steps_than_it_sets(self, strength, steps):
        tiny = build("FluxImg2ImgPipeline")
        enable(tiny.pipe, steps_computation_mask="fast", steps_computation_policy="static")
        tiny(10, strength=strength)
        assert steps_of(tiny.pipe) == [[steps, steps]]
        mask = cachedit.steps_mask(total_steps=steps, mask_policy="fast")
        stats = cachedit.summary(tiny.pipe, logging=False)[0]
        reused = [step for step, computed in enumerate(mask) if not computed]
        assert stats.cached_steps == stats.cfg_cached_steps == reused

    def test_scheduler_swapped_after_enabling(self):
        tiny = build("WanPipeline")
        enable(tiny.pipe)
        tiny(8)
        tiny.pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        swapped = tiny(6)
        assert steps_of(tiny.pipe) == [[6, 6]]
        tiny(5)
        assert torch.equal(tiny(6), swapped)

    def test_several_loops_in_one_call(self):
        """Helios denoises chunk after chunk; nothing of one chunk is reused in the next."""
        tiny = build("HeliosPipeline")
        enable(tiny.pipe)
        begun = []
        controller = cachedit.controller.controller_of(tiny.pipe.transformer)
        announce = controller.announce
        controller.announce = lambda loop: (begun.append(loop.total_steps), announce(loop))
        tiny(5)
        assert begun == [5, 5]
        assert steps_of(tiny.pipe) == [[5, 5]]
        stats = cachedit.summary(tiny.pipe, logging=False)[0]
        assert stats.computed_steps == [0, 1]

    def test_two_transformers_count_their_own_steps(self):
        tiny = build("WanPipeline + two transformers")
        enable(tiny.pipe)
        for steps in (8, 6):
            tiny(steps)
            first, second = steps_of(tiny.pipe)
            assert first[0] + second[0] == steps and min(first + second) > 0
        assert all(stats.computed_steps[0] == 0 for stats in cachedit.summary(tiny.pipe, logging=False))

    @pytest.mark.parametrize("name", [name for name in BUILDERS if name.split(" ")[0] in SEPARATE_CFG])
    def test_without_guidance_there_is_one_branch(self, name):
        """Where branches are told apart by the order of calls, a request may still have one only."""
        tiny = build(name)
        enable(tiny.pipe)
        for guided, branches in ((False, 1), (True, 2), (False, 1)):
            tiny(5, guided=guided)
            stats = cachedit.summary(tiny.pipe, logging=False)[0]
            assert [len(branch.records) for branch in stats.branches.values()][:branches] == [5] * branches
            assert stats.cached_steps == [2, 3, 4]
