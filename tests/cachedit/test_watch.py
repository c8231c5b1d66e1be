"""Requests are noticed when they start, with their true step count, whatever the pipeline does."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline

import cachedit
from cachedit import BlockAdapter, TaylorSeerCalibratorConfig
from cachedit.watch import PipelineWatch
from holds import enable, reused, reusing, same, static, zeros
from toys import call_flux, make_toy, run_toy, tiny_flux_pipeline, toy_inputs


class Pipeline:
    """Sets timesteps, announces its loop with ``progress_bar`` and runs it: the way of nearly all of diffusers."""

    def __init__(self, model=None, scheduler=None):
        self.transformer = model or make_toy()
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.reused = []  # per loop

    def progress_bar(self, iterable=None, total=None):
        return nullcontext() if iterable is None else iterable

    def denoise(self, timesteps):
        with torch.no_grad():
            outputs = [self.transformer(**toy_inputs(step, len(timesteps))) for step, _ in enumerate(timesteps)]
        self.reused += reused(self.transformer)
        return outputs

    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps):
            return self.denoise(self.scheduler.timesteps)


class Silent(Pipeline):
    """Never calls ``progress_bar``."""

    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        return self.denoise(self.scheduler.timesteps)


class Iterating(Pipeline):
    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        return self.denoise(list(self.progress_bar(self.scheduler.timesteps)))


class BarPerChunk(Pipeline):
    """Makes a video chunk by chunk, with a loop and a bar for each (Helios, FramePack)."""

    def __call__(self, steps):
        for _ in range(3):
            self.scheduler.set_timesteps(steps)
            with self.progress_bar(total=steps):
                outputs = self.denoise(self.scheduler.timesteps)
        return outputs


class OneBar(Pipeline):
    """Runs all its loops under one bar (Cosmos Transfer, Kandinsky's upscaler)."""

    def __call__(self, steps):
        with self.progress_bar(total=3 * steps):
            for _ in range(3):
                self.scheduler.set_timesteps(steps)
                outputs = self.denoise(self.scheduler.timesteps)
        return outputs


class Stages(Pipeline):
    """Fewer steps from stage to stage under one bar (Helios' pyramid)."""

    def __call__(self, steps):
        with self.progress_bar(total=steps + 8):
            for each in (steps, 8):
                self.scheduler.set_timesteps(each)
                outputs = self.denoise(self.scheduler.timesteps)
        return outputs


def cached(pipe, config=None):
    adapter = BlockAdapter(pipe=pipe, blocks=pipe.transformer.blocks, forward_pattern=pipe.transformer.pattern)
    cachedit.enable_cache(adapter, config or static("fast"), TaylorSeerCalibratorConfig())
    return pipe


@pytest.mark.parametrize("cls", [Pipeline, Silent, Iterating, BarPerChunk, OneBar, Stages])
def test_masks_by_name_follow_the_count_from_request_to_request(cls):
    pipe = cached(cls())
    loops = {BarPerChunk: 3, OneBar: 3}.get(cls, 1)
    for steps in (10, 28, 8, 10):
        pipe.reused.clear()
        pipe(steps)
        expected = [zeros("fast", steps)] * loops + ([zeros("fast", 8)] if cls is Stages else [])
        assert pipe.reused == expected


@pytest.mark.parametrize("cls", [Pipeline, Silent, Iterating, BarPerChunk, OneBar])
def test_no_request_sees_the_one_before(cls):
    pipe = cached(cls(), reusing())
    first = pipe(7)
    pipe(9)
    assert same(pipe(7), first)
    assert same(cached(Pipeline(), reusing())(7), first)


@pytest.mark.parametrize("cls", [Pipeline, Silent])
def test_a_request_that_raised_half_way(cls):
    pipe = cached(cls(), reusing())
    expected = pipe(8)

    class Stop(Exception):
        pass

    class Stopping:
        def __init__(self, model):
            self.model, self.calls = model, 0

        def __call__(self, **inputs):
            self.calls += 1
            if self.calls == 5:
                raise Stop
            return self.model(**inputs)

    model, pipe.transformer = pipe.transformer, Stopping(pipe.transformer)
    with pytest.raises(Stop):
        pipe(8)
    pipe.transformer = model
    assert same(pipe(8), expected)


@pytest.mark.parametrize("cls", [Pipeline, Silent])
def test_a_scheduler_swapped_after_enabling(cls):
    pipe = cached(cls())
    pipe(10)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (10, 8):
        pipe(steps)
        assert pipe.reused[-1] == zeros("fast", steps)


def test_schedulers_of_order_two_run_twice_per_step():
    pipe = cached(Pipeline(scheduler=FlowMatchHeunDiscreteScheduler()))
    assert len(pipe(14)) == 27
    assert pipe.reused == [zeros("fast", 27)]


def test_timesteps_that_are_made_anew_at_each_access_say_nothing():
    class Scheduler(FlowMatchEulerDiscreteScheduler):
        @property
        def timesteps(self):
            return torch.ones(len(self.steps))

        @timesteps.setter
        def timesteps(self, steps):
            self.steps = steps

    pipe = cached(Silent(scheduler=Scheduler()), reusing())
    pipe(6)
    assert pipe.reused == [[2, 3, 4, 5]]


def test_without_a_scheduler():
    pipe = cached(Silent(), reusing())
    pipe.scheduler = None
    pipe.denoise(range(6))
    assert pipe.reused == [[2, 3, 4, 5]]


def test_a_loop_of_one_s_own_that_sets_the_pipeline_s_scheduler():
    """What a pipeline runs is noticed by its bar, what the user runs by the timesteps."""
    pipe = cached(Pipeline(), reusing())
    expected = pipe(6)
    for _ in range(2):
        pipe.scheduler.set_timesteps(6)
        assert same(pipe.denoise(pipe.scheduler.timesteps), expected)


@pytest.mark.parametrize("given", [True, False])
def test_jobs_that_share_a_scheduler_give_their_counts(given):
    """A server sets the pipeline's scheduler for each new job, while the steps of others are under way."""
    pipe = cached(Pipeline(), reusing())
    for step in range(8):
        pipe.scheduler.set_timesteps(8)
        pipe.scheduler.step(torch.zeros(1), pipe.scheduler.timesteps[0], torch.zeros(1))
        with cachedit.request(pipe, "a", num_inference_steps=8 if given else None), torch.no_grad():
            pipe.transformer(**toy_inputs(step, 8))
    assert reused(pipe) == [[2, 3, 4, 5, 6, 7] if given else []]


def test_the_configured_count_goes_before_a_guess():
    """Image-to-image without a bar: 28 steps set, 17 run. Only the user can know that."""

    class SilentImage(Pipeline):
        def __call__(self, steps):
            self.scheduler.set_timesteps(steps)
            return self.denoise(self.scheduler.timesteps[11:])

    pipe = cached(SilentImage(), static("fast", num_inference_steps=17))
    for _ in range(2):
        pipe(28)
        assert pipe.reused[-1] == zeros("fast", 17)


def test_a_guess_that_the_masks_do_not_fit_is_none():
    """Seven steps have no mask by name, and the user's mask is for the steps that run, not for those that are set."""
    for mask, expected in (("fast", []), ([1, 0, 0, 1], [1, 2])):
        pipe = cached(Silent(), static(mask, residual_diff_threshold=0.0))
        pipe.scheduler.set_timesteps(7)
        pipe.denoise(pipe.scheduler.timesteps[3:])
        assert pipe.reused == [expected]


def test_arguments_of_other_progress_bars_are_passed_on():
    class Named(Pipeline):
        def progress_bar(self, iterable=None, total=None, desc=None, leave=True):
            self.seen = iterable, total, desc, leave
            return nullcontext()

    pipe = cached(Named())
    pipe.progress_bar(total=4, desc="steps", leave=False)
    assert pipe.seen == (None, 4, "steps", False)
    pipe.progress_bar([1, 2])
    assert pipe.seen == ([1, 2], None, None, True)
    plain = tiny_flux_pipeline()
    cachedit.enable_cache(plain, reusing())
    with pytest.raises(ValueError, match="`total` or `iterable`"):
        plain.progress_bar()


def test_a_bar_put_on_the_instance_by_someone_else_comes_back():
    pipe = Pipeline()
    calls = []
    pipe.progress_bar = own = lambda total: (calls.append(total), nullcontext())[1]
    cached(pipe)
    pipe(8)
    assert calls == [8]
    cachedit.disable_cache(pipe)
    assert pipe.progress_bar is own


def test_a_bar_for_something_else_leaves_the_last_request_s_statistics():
    pipe = cached(Pipeline(), reusing())
    pipe(6)
    with pipe.progress_bar(total=3):
        pass  # decoding frames
    assert reused(pipe.transformer) == [[2, 3, 4, 5]]


class TestImageToImage:
    """28 steps at strength 0.6 run 17."""

    def call(self, pipe, steps=28, seed=0, **kwargs):
        pipe.vae.register_to_config(shift_factor=0.0)
        generator = torch.Generator().manual_seed(seed)
        return pipe(
            prompt_embeds=torch.randn(1, 5, 16, generator=generator),
            pooled_prompt_embeds=torch.randn(1, 16, generator=generator),
            image=torch.rand(1, 3, 32, 32, generator=generator),
            strength=0.6,
            num_inference_steps=steps,
            height=32,
            width=32,
            guidance_scale=1.0,
            generator=generator,
            output_type="latent",
            **kwargs,
        ).images

    def test_counts_the_steps_that_run(self):
        pipe = FluxImg2ImgPipeline(**tiny_flux_pipeline().components)
        pipe.set_progress_bar_config(disable=True)
        cachedit.enable_cache(pipe, static("fast"))
        for _ in range(2):
            self.call(pipe)
            (stats,) = cachedit.summary(pipe, logging=False)
            assert stats.cached_steps == zeros("fast", 17)
            assert len(stats.computed_steps) + len(stats.cached_steps) == 17

    def test_guidance_may_be_on_or_off(self):
        """This pipeline does not name its branches; without guidance there is one, whatever its class might do."""
        pipe = FluxImg2ImgPipeline(**tiny_flux_pipeline().components)
        pipe.set_progress_bar_config(disable=True)
        cachedit.enable_cache(pipe, static("fast"))
        generator = torch.Generator().manual_seed(1)
        negative = {
            "negative_prompt_embeds": torch.randn(1, 5, 16, generator=generator),
            "negative_pooled_prompt_embeds": torch.randn(1, 16, generator=generator),
            "true_cfg_scale": 2.0,
        }
        for kwargs, names in (({}, ["cond"]), (negative, ["cond", "uncond"]), ({}, ["cond"])):
            self.call(pipe, **kwargs)
            (stats,) = cachedit.summary(pipe, logging=False)
            assert list(stats.branches) == names
            assert all(branch.reused_steps == zeros("fast", 17) for branch in stats.branches.values())

    @pytest.mark.parametrize("enabled", ["on both", "on the first", "on the second"])
    def test_beside_text_to_image_on_one_transformer(self, enabled):
        text = tiny_flux_pipeline()
        image = FluxImg2ImgPipeline.from_pipe(text)
        image.set_progress_bar_config(disable=True)
        for pipe in {"on both": (text, image), "on the first": (text,), "on the second": (image,)}[enabled]:
            cachedit.enable_cache(pipe, reusing(), TaylorSeerCalibratorConfig())
        first = call_flux(text, 8), self.call(image)
        assert torch.equal(call_flux(text, 8), first[0]) and torch.equal(self.call(image), first[1])
        assert len(cachedit.summary(text.transformer, logging=False)[0].computed_steps) == 2


def test_two_transformers_count_their_own_steps_unless_told():
    """The pipeline's 10 steps are shared out between the two; a mask by name needs each one's count."""

    class Two(Pipeline):
        def __init__(self):
            super().__init__()
            self.transformer_2 = make_toy(seed=1)

        def __call__(self, steps):
            self.scheduler.set_timesteps(steps)
            with self.progress_bar(total=steps), torch.no_grad():
                for step in range(steps):
                    model = self.transformer if step < 4 else self.transformer_2
                    model(**toy_inputs(step, steps))

    pipe = Two()
    models = [pipe.transformer, pipe.transformer_2]
    adapter = BlockAdapter(
        pipe=pipe, transformer=models, blocks=[model.blocks for model in models], forward_pattern=models[0].pattern
    )
    cachedit.enable_cache(adapter, reusing(max_warmup_steps=3))
    for _ in range(2):
        pipe(10)
        assert reused(pipe) == [[3], [3, 4, 5]]
    modifiers = [cachedit.ParamsModifier(num_inference_steps=count) for count in (4, 6)]
    cachedit.enable_cache(adapter, static("fast"), params_modifiers=modifiers)
    for _ in range(2):
        pipe(10)
        assert reused(pipe) == [zeros("fast", 4), zeros("fast", 6)]


def test_a_mask_by_name_without_a_count_says_so_once(caplog):
    model = enable(make_toy(), static("fast", residual_diff_threshold=0.0))
    for _ in range(2):
        run_toy(model, 3)
        cachedit.refresh_context(model)
    messages = [record.message for record in caplog.records if "steps_computation_mask='fast'" in record.message]
    assert len(messages) == 1 and "set num_inference_steps" in messages[0]


def test_copies_of_a_pipeline_are_watched_and_copies_of_a_transformer_are_not():
    pipe = cached(Silent(), reusing())
    expected = pipe(6)
    other = copy.deepcopy(pipe)
    assert PipelineWatch.of(other) is not PipelineWatch.of(pipe)
    for each in (other, pipe, other):
        assert same(each(6), expected)
    model = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        outputs = []
        for step in range(6):
            pipe.scheduler.set_timesteps(6)  # none of the copy's business
            outputs.append(model(**toy_inputs(step, 6)))
    assert same(outputs, expected)


def test_a_transformer_does_not_keep_its_pipeline_alive():
    pipe = cached(Pipeline(), reusing())
    pipe(4)
    model, gone = pipe.transformer, weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    cachedit.refresh_context(model)
    assert len(run_toy(model, 4)) == 4 and reused(model) == [[2, 3]]
