"""A script as users of cache_dit write them; it knows nothing of the package that it runs on in the tests."""

import argparse
import sys

import cache_dit
import torch
from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
from cache_dit.caching.cache_contexts.calibrators import TaylorSeerCalibratorConfig as SameConfig
from cache_dit.caching.load_configs import load_configs
from cache_dit.platforms import current_platform
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--save", default=None)
parser.add_argument("folder")
args = parser.parse_args()

device = current_platform.device_type if current_platform.is_accelerator_available() else "cpu"
absent = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
pipe = DiffusionPipeline.from_pretrained(args.folder, **absent).to(device)
pipe.set_progress_bar_config(disable=True)
assert isinstance(pipe.transformer, FluxTransformer2DModel)
assert isinstance(pipe.vae, AutoencoderKL) and isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)


def run_pipe():
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(
        prompt_embeds=torch.randn(1, 5, 16, generator=generator).to(device),
        pooled_prompt_embeds=torch.randn(1, 16, generator=generator).to(device),
        height=32,
        width=32,
        num_inference_steps=args.steps,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    ).images


baseline = run_pipe()

cache_config = DBCacheConfig(
    Fn_compute_blocks=1,
    Bn_compute_blocks=0,
    max_warmup_steps=2,
    residual_diff_threshold=10.0,
    steps_computation_mask=cache_dit.steps_mask(mask_policy="fast", total_steps=args.steps),
    steps_computation_policy="static",
)
cache_dit.enable_cache(
    pipe, cache_config=cache_config, calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1)
)
cached = run_pipe()
stats = cache_dit.summary(pipe, details=True)
print("cached steps:", stats[0].cached_steps)
print("tag:", cache_dit.strify(stats))
cache_dit.disable_cache(pipe)
assert torch.equal(run_pipe(), baseline) and not torch.equal(cached, baseline)

cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
    ),
    cache_config=cache_config,
    calibrator_config=SameConfig(taylorseer_order=1),
)
assert not torch.equal(run_pipe(), baseline)
cache_dit.disable_cache(pipe)

configs = load_configs({"cache_config": {"residual_diff_threshold": 0.0, "Fn_compute_blocks": 1}})
cache_dit.enable_cache(pipe, cache_config=configs["cache_config"])
assert torch.equal(run_pipe(), baseline)
if args.save:
    torch.save(cached, args.save)
sys.exit(7 if cache_dit.NONE is cache_dit.cache_type("nc") else 8)
