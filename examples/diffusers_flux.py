"""Caching a diffusers FLUX pipeline: two lines more than without.

python examples/diffusers_flux.py --model black-forest-labs/FLUX.1-dev --prompt "a cat holding a sign"
"""

import argparse
import time

import torch
from diffusers import FluxPipeline

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="local folder or hub name")
    parser.add_argument("--prompt", default="a cat holding a sign that says hello world")
    parser.add_argument("--steps", type=int, default=28)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = FluxPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16).to(device)
    cachedit.enable_cache(
        pipe,
        DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.12),
        TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    start = time.perf_counter()
    image = pipe(arguments.prompt, num_inference_steps=arguments.steps).images[0]
    print(f"{time.perf_counter() - start:.1f} s")
    cachedit.summary(pipe)
    image.save("flux.png")


if __name__ == "__main__":
    main()
