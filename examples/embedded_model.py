"""The shipped model with and without the cache, in a few lines. Runs offline, in seconds.

python examples/embedded_model.py
"""

import time

import torch

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.embedded import load_pipeline

PROMPT = ["a red circle left of a blue square", "two small green triangles above a large yellow ring"]


def draw(pipe):
    start = time.perf_counter()
    images = pipe(PROMPT, num_inference_steps=28, generator=torch.Generator().manual_seed(0), output_size=256).images
    print(f"{time.perf_counter() - start:.2f} s")
    return images


def main() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    cachedit.enable_cache(
        pipe,
        DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask="fast", steps_computation_policy="static"),
        TaylorSeerCalibratorConfig(),
    )
    cached = draw(pipe)
    cachedit.summary(pipe)
    for i, (a, b) in enumerate(zip(plain, cached, strict=True)):
        a.save(f"plain-{i}.png")
        b.save(f"cached-{i}.png")


if __name__ == "__main__":
    main()
