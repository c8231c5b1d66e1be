"""Do caching and torch.compile add up? A request of the embedded model with neither, one of them, and both.

    python benchmarks/bench_compile.py [--steps 28] [--batch 8] [--rounds 9] [--backend inductor] [--csv PATH]

A static mask fixes the decisions, so that ours and cache_dit (if it is installed) run the same blocks. Requests are
taken in turns in one process. "speed-up" is over neither; "of product" is the speed-up of both over the product of that
by the cache alone and that by the compiler alone: 1.00 where they add up. "graphs" and "breaks" are dynamo's counts.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import cachedit
from cachedit.embedded import load_pipeline
from cachedit_kernels.testing.timing import paired_medians
from common import append, machine, own_forward

RESULTS = Path(__file__).parent / "results" / "compile.csv"
PROMPT = "a red ring"
FIGURES = ("seconds", "speedup", "of_product", "graphs", "breaks")


def draw(pipe: Any, steps: int, batch: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    images: torch.Tensor = pipe(
        [PROMPT] * batch, num_inference_steps=steps, generator=noise, output_type="latent"
    ).images
    return images


def build(package: Any, steps: int, compiled: bool, backend: str) -> Any:
    """The pipeline, cached by a package (None: not at all) and compiled as a whole, or not."""
    pipe = load_pipeline()
    own_forward(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    if package is not None:
        mask = [1, 1] + [int(step % 3 == 2) for step in range(2, steps)]
        config = package.DBCacheConfig(
            Fn_compute_blocks=1,
            max_warmup_steps=2,
            num_inference_steps=steps,
            steps_computation_mask=mask,
            steps_computation_policy="static",
        )
        calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=1)
        target = pipe if package is cachedit else adapter(package, pipe)
        package.enable_cache(target, cache_config=config, calibrator_config=calibrator)
    if compiled:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    return pipe


def adapter(package: Any, pipe: Any) -> Any:
    """cache_dit does not know the embedded pipeline's class."""
    transformer = pipe.transformer
    return package.BlockAdapter(
        pipe=pipe,
        transformer=transformer,
        blocks=[transformer.transformer_blocks, transformer.single_transformer_blocks],
        forward_pattern=[package.ForwardPattern.Pattern_1] * 2,
        check_forward_pattern=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--batch", type=int, default=8, help="pictures per request")
    parser.add_argument("--rounds", type=int, default=9, help="turns that each candidate takes; medians are reported")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="history to add to (default: %(default)s)")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    packages = {"none": None, "cachedit": cachedit}
    try:
        import cache_dit
    except ImportError:
        pass
    else:
        packages["cache_dit"] = cache_dit
    candidates: dict[tuple[str, bool], Callable[[], object]] = {}
    counts: dict[tuple[str, bool], tuple[int, int]] = {}
    for name, package in packages.items():
        for compiled in (False, True):
            counters.clear()
            pipe = build(package, arguments.steps, compiled, arguments.backend)
            run = candidates[name, compiled] = lambda pipe=pipe: draw(pipe, arguments.steps, arguments.batch)
            for _ in range(2):  # compiles
                run()
            counts[name, compiled] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    cpu = torch.device("cpu")
    medians = paired_medians({str(key): run for key, run in candidates.items()}, cpu, arguments.rounds)
    seconds = {key: medians[str(key)] for key in candidates}
    print(f"{'cache':>10} {'compiled':>9}" + "".join(f"{figure:>12}" for figure in FIGURES))
    for key in candidates:
        report(key, seconds, counts[key], arguments)


def report(
    key: tuple[str, bool],
    seconds: dict[tuple[str, bool], float],
    counts: tuple[int, int],
    arguments: argparse.Namespace,
) -> None:
    """Print a row and add it to the history."""
    name, compiled = key
    neither = seconds["none", False]
    product = neither / seconds["none", True] * neither / seconds[name, False]
    figures = (
        f"{seconds[key]:.4f}",
        f"{neither / seconds[key]:.2f}",
        f"{neither / seconds[key] / product:.2f}" if compiled and name != "none" else "",
        *counts,
    )
    print(f"{name:>10} {compiled!s:>9}" + "".join(f"{figure!s:>12}" for figure in figures))
    row = machine(torch.device("cpu")) | {
        "backend": arguments.backend,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "cache": name,
        "compiled": compiled,
    }
    append(arguments.csv, row | dict(zip(FIGURES, figures, strict=True)))


if __name__ == "__main__":
    main()
