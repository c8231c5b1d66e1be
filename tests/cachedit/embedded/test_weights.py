"""The shipped weights: small, offline, and they draw what the prompt says."""

import csv

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from cachedit.embedded import WEIGHTS, EmbeddedPipeline, load_pipeline
from cachedit.embedded.check import check_pipeline, report

PROMPT = "a striped blue square in front of a red circle"


@pytest.fixture(scope="module")
def pipeline():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_kind(pipeline):
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 12e6
    assert type(pipeline) is EmbeddedPipeline and type(pipeline.transformer) is FluxTransformer2DModel
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert (
        len(pipeline.transformer.transformer_blocks) == 4 and len(pipeline.transformer.single_transformer_blocks) == 8
    )
    assert pipeline.transformer.dtype == torch.float32 and not pipeline.transformer.training


def test_pixel_check_on_held_out_prompts(pipeline):
    result = check_pipeline(pipeline, prompts=24, steps=10)
    assert result.share >= 0.85, report(result)


def test_one_seed_one_picture_and_save_and_load(pipeline, tmp_path):
    def run(pipe):
        generator = torch.Generator().manual_seed(5)
        return pipe(PROMPT, num_inference_steps=4, generator=generator, output_type="pt").images

    before = run(pipeline)
    assert torch.equal(before, run(pipeline))
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(path=tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(before, run(again))


def test_bfloat16_draws_nearly_the_same(pipeline):
    half = load_pipeline(dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = (p(PROMPT, num_inference_steps=8, latents=noise, output_type="pt").images for p in (pipeline, half))
    assert half.transformer.dtype == torch.bfloat16
    assert (first - second).square().mean() < 1e-3


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        load_pipeline(path=tmp_path)


def test_the_training_log_is_complete():
    with (WEIGHTS.parent / "training_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "loss", "lr", "seconds", "held_out_loss", "check"]
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 10
    assert [float(row["check"]) for row in rows if row["check"]][-1] >= 0.9
