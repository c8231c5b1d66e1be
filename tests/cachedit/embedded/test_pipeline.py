"""The pipeline as a diffusers pipeline: inputs, outputs, determinism, progress, saving."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image

from cachedit.embedded import EmbeddedPipeline
from cachedit.embedded.pipeline import image_ids, pack, unpack
from cachedit.embedded.prompt import PromptError

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=48, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=96, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = EmbeddedPipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, prompt=PROMPT, steps=3, seed=0, output_type="pt", **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type=output_type, **kwargs).images


def test_pack_and_unpack_are_inverse():
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(unpack(pack(images)), images)
    assert pack(images).shape == (2, 64, 48)
    row, column = image_ids()[9, 1:].int().tolist()
    assert torch.equal(
        pack(images)[0, 9].view(3, 4, 4), images[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    )


def test_output_types(pipeline):
    pt, array, pil, latents = (run(pipeline, output_type=kind) for kind in ("pt", "np", "pil", "latent"))
    assert pt.shape == (1, 3, 32, 32) and pt.dtype == torch.float32 and pt.min() >= 0 and pt.max() <= 1
    assert isinstance(array, np.ndarray) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), pt)
    assert isinstance(pil[0], Image.Image) and pil[0].size == (32, 32)
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert run(pipeline, output_type="pil", output_size=256)[0].size == (256, 256)
    assert isinstance(pipeline(PROMPT, num_inference_steps=1, return_dict=False), tuple)


def test_one_seed_one_picture(pipeline):
    assert torch.equal(run(pipeline), run(pipeline))
    assert not torch.equal(run(pipeline), run(pipeline, seed=1))
    assert not torch.equal(run(pipeline), run(pipeline, "a blue ring"))


def test_a_batch_equals_its_pictures(pipeline):
    prompts = [PROMPT, "two small green triangles above a large yellow ring", "a pink cross on a white background"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = pipeline(prompts, num_inference_steps=3, generator=generators, output_type="pt").images
    alone = torch.cat([run(pipeline, prompt, seed=seed) for seed, prompt in enumerate(prompts)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_latents_are_the_noise(pipeline):
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(pipeline, latents=noise), run(pipeline))
    with pytest.raises(ValueError, match=r"latents must have shape \(1, 3, 32, 32\), got \(2, 3, 32, 32\)"):
        run(pipeline, latents=noise.repeat(2, 1, 1, 1))


def test_callback_sees_and_changes_the_latents(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {}

    plain = run(pipeline, callback_on_step_end=watch)
    assert [item[0] for item in seen] == [0, 1, 2] and seen[0][1] > seen[1][1] > seen[2][1]
    assert {item[2] for item in seen} == {(1, 3, 32, 32)} and pipeline.num_timesteps == 3
    assert torch.equal(plain, run(pipeline))
    blank = run(pipeline, callback_on_step_end=lambda *a: {"latents": torch.zeros(1, 3, 32, 32)})
    assert torch.equal(blank, torch.full_like(blank, 0.5))

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    calls = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *a: calls.append(1))
    run(pipeline, steps=5, callback_on_step_end=stop)
    hook.remove()
    assert len(calls) == 2


def test_the_transformer_runs_in_its_cache_context_once_a_step(pipeline, monkeypatch):
    names = []
    original = type(pipeline.transformer).cache_context
    monkeypatch.setattr(
        type(pipeline.transformer), "cache_context", lambda self, name: names.append(name) or original(self, name)
    )
    run(pipeline, steps=4)
    assert names == ["cond"] * 4


def test_progress_bar_counts_the_steps(pipeline, monkeypatch):
    totals, updates = [], []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def update(self):
            updates.append(1)

    monkeypatch.setattr(pipeline, "progress_bar", lambda iterable=None, total=None: totals.append(total) or Bar())
    run(pipeline, steps=5)
    assert totals == [5] and len(updates) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": "a red star"}, PromptError, "'star' is not a word I know"),
        ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, got int"),
        ({"prompt": [PROMPT, 3]}, TypeError, "prompt must be a string or a list"),
        ({"prompt": []}, ValueError, "empty list"),
        ({"height": 64}, ValueError, "draws 32 x 32 pictures, height=64 and width=32"),
        ({"num_inference_steps": 0}, ValueError, "positive integer, got 0"),
        ({"num_inference_steps": 2.5}, ValueError, "positive integer, got 2.5"),
        ({"output_type": "jpg"}, ValueError, "output_type must be"),
        ({"output_type": "np", "output_size": 64}, ValueError, "output_size"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, ValueError, "must be among"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "2 generators for a batch of 1"),
    ],
)
def test_bad_arguments(pipeline, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline(**{"prompt": PROMPT, "num_inference_steps": 1, **arguments})


def test_save_and_load(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = EmbeddedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded), run(pipeline))
    assert type(loaded.transformer) is FluxTransformer2DModel
    assert (tmp_path / "model_index.json").exists() and (tmp_path / "scheduler").is_dir()


def test_components_and_signature(pipeline):
    assert set(pipeline.components) == {"transformer", "scheduler"} and isinstance(pipeline, DiffusionPipeline)
    parameters = inspect.signature(EmbeddedPipeline.__call__).parameters
    assert parameters["num_inference_steps"].default == 28


def test_half_precision_keeps_the_picture(pipeline):
    single = run(pipeline)
    other = EmbeddedPipeline.from_pipe(pipeline, dtype=torch.float32)
    other.transformer.to(torch.bfloat16)
    other.set_progress_bar_config(disable=True)
    try:
        assert (run(other) - single).abs().mean() < 0.05
    finally:
        pipeline.transformer.to(torch.float32)
