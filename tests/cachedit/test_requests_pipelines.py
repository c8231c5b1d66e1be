"""Requests with keys around whole pipeline calls, from several threads."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FluxPipeline

import cachedit
from cachedit import TaylorSeerCalibratorConfig
from holds import both_kinds, reused, reusing, static, zeros
from toys import call_flux, tiny_flux_pipeline

JOBS = [6, 8, 9, 10]  # steps; the position is the seed


@pytest.fixture
def pipe():
    return tiny_flux_pipeline()


def sharing(pipe, count=4):
    """Pipelines with schedulers of their own, which are not safe between threads, around one transformer."""
    components = pipe.components
    pipes = [FluxPipeline(**components | {"scheduler": copy.deepcopy(pipe.scheduler)}) for _ in range(count)]
    for each in pipes:
        each.set_progress_bar_config(disable=True)
    return pipes


def alone(config, steps, seed):
    pipe = tiny_flux_pipeline()
    cachedit.enable_cache(pipe, config, TaylorSeerCalibratorConfig())
    return call_flux(pipe, steps, seed=seed)


def work(pipe, seed):
    with cachedit.request(pipe.transformer, seed):
        return [call_flux(pipe, JOBS[seed], seed=seed) for _ in range(2)], reused(pipe.transformer)


@both_kinds
def test_four_pipelines_on_one_transformer_in_four_threads(kind, pipe):
    config = static("fast", kind)
    pipes = sharing(pipe)
    for each in pipes:
        cachedit.enable_cache(each, config, TaylorSeerCalibratorConfig())
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, pipes, range(4)))
    for seed, (outputs, steps) in enumerate(results):
        expected = alone(config, JOBS[seed], seed)
        assert all(torch.equal(output, expected) for output in outputs)
        assert steps == [zeros("fast", JOBS[seed])]


@both_kinds
def test_four_transformers_in_four_threads(kind):
    config = reusing(kind)
    pipes = [tiny_flux_pipeline() for _ in range(4)]
    for each in pipes:
        cachedit.enable_cache(each, config, TaylorSeerCalibratorConfig())
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda seed: call_flux(pipes[seed], JOBS[seed], seed=seed), range(4)))
    for seed, output in enumerate(outputs):
        assert torch.equal(output, alone(config, JOBS[seed], seed))


def test_without_keys_threads_on_one_transformer_are_told(pipe):
    first, second = sharing(pipe, 2)
    for each in (first, second):
        cachedit.enable_cache(each, reusing(), TaylorSeerCalibratorConfig())
    expected = call_flux(first, 6)
    errors = []

    def intrude(*_):
        handle.remove()
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    def attempt():
        with pytest.raises(RuntimeError, match=r"two threads run one request.*cachedit\.request") as error:
            call_flux(second, 6)
        errors.append(error)

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(intrude)
    assert torch.equal(call_flux(first, 6), expected) and len(errors) == 1


def test_pipeline_calls_interleaved_step_by_step(pipe):
    """A callback between two steps of one request runs a whole other request on the same transformer."""
    outer, inner = sharing(pipe, 2)
    config = reusing()
    for each in (outer, inner):
        cachedit.enable_cache(each, config, TaylorSeerCalibratorConfig())
    outputs = []

    def between(pipe, step, timestep, kwargs):
        with cachedit.request(inner, "inner"):
            outputs.append(call_flux(inner, JOBS[1], seed=1))
        return kwargs

    generator = torch.Generator().manual_seed(0)
    with cachedit.request(outer, "outer"):
        latents = outer(
            prompt_embeds=torch.randn(1, 5, 16, generator=generator),
            pooled_prompt_embeds=torch.randn(1, 16, generator=generator),
            num_inference_steps=JOBS[0],
            height=32,
            width=32,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=between,
        ).images
    assert torch.equal(latents, alone(config, JOBS[0], 0))
    assert len(outputs) == JOBS[0]
    assert all(torch.equal(output, alone(config, JOBS[1], 1)) for output in outputs[:2])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_the_pipeline_s_count_goes_before_the_context_s(pipe):
    cachedit.enable_cache(pipe, static("fast"))
    with cachedit.request(pipe, "a", num_inference_steps=28):
        call_flux(pipe, 8)
        assert reused(pipe) == [zeros("fast", 8)]
