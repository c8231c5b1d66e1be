import inspect
import re

import diffusers
import pytest
import torch
from torch import nn

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.models import DENOISERS, MODELS, PIPELINES, find_transformers
from pipelines import BUILDERS, build

IN_TURN = [name for name in BUILDERS if PIPELINES[name.partition(" + ")[0]].guidance == "in turn"]


def enable(pipe, **kwargs):
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=10.0, **kwargs)
    return cachedit.enable_cache(pipe, config, TaylorSeerCalibratorConfig())


def steps_of(pipe):
    """Per transformer and branch, how many steps the request had."""
    return [[len(b.records) for b in stats.branches.values()] for stats in cachedit.summary(pipe, logging=False)]


class TestTables:
    @pytest.mark.parametrize("name", [*DENOISERS, *PIPELINES])
    def test_names_are_pipelines(self, name):
        assert name.endswith("Pipeline") and hasattr(diffusers, name)  # a dummy, where an optional package is missing

    @pytest.mark.parametrize("name", BUILDERS)
    def test_rows_say_what_the_small_pipelines_do(self, name):
        tiny = build(name)
        entry = PIPELINES[name.partition(" + ")[0]]
        assert {type(module).__name__ for module in find_transformers(tiny.pipe)} == {entry.transformer}
        if tiny.branches > 1:
            assert entry.guidance in ("named", "in turn")
        else:
            assert entry.guidance == ("one batch" if tiny.guided else "none")

    def test_tried_are_those_that_have_small_pipelines(self):
        tried = {name.partition(" + ")[0] for name in BUILDERS}
        assert {name for name, entry in PIPELINES.items() if entry.tried} == tried
        assert {entry.guidance for entry in PIPELINES.values() if not entry.tried} == {""}
        assert list(PIPELINES) == sorted(PIPELINES, key=str.lower)

    def test_every_pipeline_with_a_transformer_of_the_table_has_a_row(self):
        for name in (name for name in dir(diffusers) if name.endswith("Pipeline") and name not in PIPELINES):
            cls = getattr(diffusers, name)
            if issubclass(cls, diffusers.DiffusionPipeline) and cls is not diffusers.DiffusionPipeline:
                transformer = inspect.signature(cls).parameters.get("transformer")
                named = transformer is not None and re.findall(r"\w+", str(transformer.annotation))
                assert not named or not set(named) & set(MODELS), name

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

    @pytest.mark.parametrize("name", IN_TURN)
    def test_without_guidance_there_is_one_branch(self, name):
        """Where branches are told apart by the order of calls, a request may still have one only."""
        tiny = build(name)
        enable(tiny.pipe)
        for guided, branches in ((False, 1), (True, 2), (False, 1)):
            tiny(5, guided=guided)
            stats = cachedit.summary(tiny.pipe, logging=False)[0]
            assert [len(branch.records) for branch in stats.branches.values()][:branches] == [5] * branches
            assert stats.cached_steps == [2, 3, 4]
