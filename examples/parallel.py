"""One picture, several ranks: sequence and tensor parallelism, with the cache on.

On CPU, with the shipped model:

    torchrun --nproc-per-node 2 examples/parallel.py

On a node with 8 GPUs, and on two of them (the ring between the nodes, Ulysses within each):

    torchrun --nproc-per-node 8 examples/parallel.py --model black-forest-labs/FLUX.1-dev --float8
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/parallel.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --ulysses 8 --ring 2
"""

import argparse
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import cachedit
from cachedit import DBCacheConfig, ParallelismConfig, TaylorSeerCalibratorConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a pipeline on the Hub, or a folder; default: the shipped model")
    parser.add_argument("--prompt", default="a red circle left of a blue square")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--ulysses", default="auto")
    parser.add_argument("--ring", default="1")
    parser.add_argument("--tp", default="1")
    parser.add_argument("--float8", action="store_true", help="exchange Q, V and O in FP8")
    return parser.parse_args()


def load(model: str | None, device: torch.device) -> object:
    if model is None:
        from cachedit.embedded import load_pipeline

        return load_pipeline().to(device)
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)


def size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main() -> None:
    args = arguments()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=5))
    pipe = load(args.model, device)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> object:
        generator = torch.Generator().manual_seed(0)  # the same noise on every rank
        start = time.perf_counter()
        output = pipe(args.prompt, num_inference_steps=args.steps, generator=generator)
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - start:.2f} s")
        return output

    draw()
    cachedit.enable_cache(
        pipe,
        DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.12),
        TaylorSeerCalibratorConfig(),
        parallelism_config=ParallelismConfig(
            ulysses_size=size(args.ulysses),
            ring_size=size(args.ring),
            tp_size=size(args.tp),
            ulysses_float8=args.float8,
        ),
    )
    output = draw()
    if dist.get_rank() == 0:
        cachedit.summary(pipe)
        if hasattr(output, "images"):
            output.images[0].save("parallel.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
