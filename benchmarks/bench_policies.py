"""Every policy and calibrator on the embedded model: what is skipped, what it costs in quality, what it saves in time.

    python benchmarks/bench_policies.py [--steps 28] [--rounds 7] [--csv PATH]

Quality is measured against the same prompts and noise without a cache, also for the plain model with fewer steps, which
is what every policy has to beat. Baseline and cached runs take turns; times are medians, the ratio is that of pairs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import cachedit
from cachedit import (
    BasicCacheConfig,
    CalibratorConfig,
    DBCacheConfig,
    DBPruneConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    TaylorSeerCalibratorConfig,
    TeaCacheConfig,
)
from cachedit.cli.demo import PROMPTS, Demo, demo_mask
from cachedit.cli.quality import compare
from cachedit.embedded import load_pipeline
from cachedit.teacache import fit_coefficients
from common import append, device_name

RESULTS = Path(__file__).parent / "results" / "policies.csv"
Row = tuple[str, BasicCacheConfig | None, CalibratorConfig | None, int]

MEASURED = {"Fn_compute_blocks": 1, "max_warmup_steps": 3}
CALIBRATORS: dict[str, CalibratorConfig | None] = {
    "plain reuse": None,
    "TaylorSeer 1": TaylorSeerCalibratorConfig(taylorseer_order=1),
    "TaylorSeer 2": TaylorSeerCalibratorConfig(taylorseer_order=2),
    "Hermite 2": HermiteCalibratorConfig(hermite_order=2),
    "FoCa": FoCaCalibratorConfig(),
    "DMD": DMDCalibratorConfig(),
}


def rows(steps: int, coefficients: tuple[float, ...]) -> Iterator[Row]:
    for threshold, run in ((0.12, 1), (0.2, 2)):
        config = DBCacheConfig(**MEASURED, residual_diff_threshold=threshold, max_continuous_cached_steps=run)
        for name, calibrator in CALIBRATORS.items():
            yield f"DBCache {threshold}, {name}", config, calibrator, steps
    mask = DBCacheConfig(**MEASURED, steps_computation_mask=demo_mask(steps), steps_computation_policy="static")
    for name, calibrator in CALIBRATORS.items():
        yield f"mask, {name}", mask, calibrator, steps
    for threshold in (0.06, 0.1):
        for name in ("plain reuse", "TaylorSeer 1"):
            prune = DBPruneConfig(**MEASURED, residual_diff_threshold=threshold)
            yield f"DBPrune {threshold}, {name}", prune, CALIBRATORS[name], steps
    for threshold in (0.04, 0.08):
        for name in ("plain reuse", "TaylorSeer 1"):
            tea = TeaCacheConfig(threshold, coefficients, max_warmup_steps=3)
            yield f"TeaCache {threshold}, {name}", tea, CALIBRATORS[name], steps
    for fewer in (10, 12, 16, 20):
        yield f"plain model, {fewer} steps", None, None, fewer


def fit(demo: Demo, steps: int) -> tuple[float, ...]:
    """TeaCache's polynomial for the embedded model, from other noise than is measured on."""
    signals: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    transformer = demo.pipe.transformer
    handles = [
        transformer.transformer_blocks[0].norm1.register_forward_hook(lambda _m, _a, out: signals.append(out[0])),
        transformer.register_forward_hook(lambda _m, _a, out: outputs.append(out[0])),
    ]
    Demo(demo.pipe, demo.prompts, seed=1).draw(steps)
    for handle in handles:
        handle.remove()

    def changes(values: list[torch.Tensor]) -> list[float]:
        return [((b - a).abs().sum() / a.abs().sum()).item() for a, b in itertools.pairwise(values)]

    return fit_coefficients(zip(changes(signals), changes(outputs), strict=True))


@contextmanager
def cached(pipe: Any, config: BasicCacheConfig | None, calibrator: CalibratorConfig | None) -> Iterator[None]:
    if config is not None:
        cachedit.enable_cache(pipe, config, calibrator)
    try:
        yield
    finally:
        cachedit.disable_cache(pipe)


def seconds(demo: Demo, steps: int) -> float:
    start = time.perf_counter()
    demo.draw(steps)
    return time.perf_counter() - start


def measure(demo: Demo, row: Row, baseline: torch.Tensor, steps: int, rounds: int) -> dict[str, Any]:
    name, config, calibrator, own_steps = row
    times, ratios, skipped = [], [], 1 - own_steps / steps
    for _ in range(rounds):
        plain = seconds(demo, steps)
        with cached(demo.pipe, config, calibrator):
            images = demo.draw(own_steps)
            times.append(seconds(demo, own_steps))
            ratios.append(plain / times[-1])
            if config is not None:
                skipped = cachedit.summary(demo.pipe, logging=False)[0].main.skipped_blocks
    quality = compare(images, baseline)
    return {
        "name": name,
        "skipped": f"{skipped:.1%}",
        "psnr_db": f"{quality.psnr_db:.1f}",
        "psnr_db_min": f"{quality.psnr_db_min:.1f}",
        "ssim": f"{quality.ssim:.4f}",
        "ms": f"{1e3 * statistics.median(times):.0f}",
        "speedup": f"{statistics.median(ratios):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="pictures (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs per row")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="history to add to (default: %(default)s)")
    arguments = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    demo = Demo(pipe, PROMPTS[: arguments.prompts], seed=0)
    baseline = demo.draw(arguments.steps)
    common = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(pipe.device),
        "torch": torch.__version__,
        "steps": arguments.steps,
    }
    for row in rows(arguments.steps, fit(demo, arguments.steps)):
        result = measure(demo, row, baseline, arguments.steps, arguments.rounds)
        columns = (f"{value:>32}" if key == "name" else f"{value:>8}" for key, value in result.items())
        print("  ".join(columns), flush=True)
        append(arguments.csv, common | result)


if __name__ == "__main__":
    main()
