"""``cachedit demo``: the embedded model with and without the cache, side by side."""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import cachedit
import cachedit_kernels
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.embedded import load_pipeline
from cachedit.oracle import oracle
from cachedit.policy import StepRecord
from cachedit.stats import BranchStats

from . import figures
from .quality import Quality, compare

PROMPTS = (
    "a red circle left of a blue square",
    "two small green triangles above a large yellow ring",
    "a striped blue square in front of a red circle",
    "a small purple cross between a large orange diamond and a large cyan ring",
    "three small pink circles on a navy background",
    "a large striped green ring below a small red triangle on a white background",
    "a yellow diamond at the top left and a striped cyan cross at the bottom right on a black background",
    "a small blue triangle behind a striped orange ring",
)

FIRST_BLOCKS = 1
WARMUP = 3


@dataclass(frozen=True)
class Configuration:
    """One row of the comparison; ``cache`` None is the plain model."""

    name: str
    steps: int
    cache: DBCacheConfig | None = None
    calibrator: TaylorSeerCalibratorConfig | None = None


@dataclass
class Result:
    """What was measured of a configuration. Times in seconds for all pictures; one entry per timed round."""

    configuration: Configuration
    images: torch.Tensor
    stats: BranchStats
    seconds: list[float] = field(default_factory=list)
    oracle_seconds: list[float] = field(default_factory=list)
    baseline_seconds: list[float] = field(default_factory=list)
    quality: Quality | None = None

    def as_dict(self) -> dict[str, Any]:
        """The entry of ``report.json``."""
        efficiencies = [o / c for o, c in zip(self.oracle_seconds, self.seconds, strict=True)]
        report: dict[str, Any] = {
            "seconds": statistics.median(self.seconds),
            "speedup": _median_ratio(self.baseline_seconds, self.seconds),
            "ideal_speedup": _median_ratio(self.baseline_seconds, self.oracle_seconds),
            "efficiency": statistics.median(efficiencies),
            "computed_steps": len(self.stats.computed_steps),
            "reused_steps": len(self.stats.reused_steps),
        }
        if self.quality is not None:
            report |= self.quality.as_dict()
        config, calibrator = self.configuration.cache, self.configuration.calibrator
        report["cache"] = None if config is None else config.strify()
        report["calibrator"] = None if calibrator is None else calibrator.strify(details=True)
        report["steps_reused"] = self.stats.reused_steps
        report["residual_diffs"] = self.stats.diffs
        report["rounds"] = [
            {"baseline_seconds": b, "seconds": c, "oracle_seconds": o}
            for b, c, o in zip(self.baseline_seconds, self.seconds, self.oracle_seconds, strict=True)
        ]
        return report


def configurations(steps: int) -> list[Configuration]:
    """The cached rows. All compute the first block always, and nothing at the end (Fn=1, Bn=0)."""
    base = DBCacheConfig(
        Fn_compute_blocks=FIRST_BLOCKS,
        max_warmup_steps=WARMUP,
        residual_diff_threshold=0.2,
        max_continuous_cached_steps=2,
    )
    masked = replace(base, steps_computation_mask=demo_mask(steps), steps_computation_policy="static")
    taylor = TaylorSeerCalibratorConfig(taylorseer_order=1)
    return [
        Configuration("DBCache", steps, base),
        Configuration("DBCache + TaylorSeer", steps, base, taylor),
        Configuration("DBCache + TaylorSeer + mask", steps, masked, taylor),
    ]


def demo_mask(steps: int) -> list[int]:
    """A mask for the embedded model: three of four steps reused, fewer at both ends, where residuals move most."""
    head, period, tail = "11001", "0001", "10010101"
    if steps < len(head) + len(tail):
        return cachedit.steps_mask(total_steps=steps, mask_policy="fast")
    middle = (period * steps)[: steps - len(head) - len(tail)]
    return [int(bit) for bit in head + middle + tail]


class Demo:
    """Runs configurations on one pipeline with fixed prompts and noise.

    Args:
        pipe: The embedded pipeline.
        prompts: What to draw.
        seed: Seed of the noise; every configuration starts from the same.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], seed: int):
        self.pipe = pipe
        self.prompts = list(prompts)
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(len(prompts), 3, 32, 32, generator=generator).to(pipe.device)

    def draw(self, steps: int) -> torch.Tensor:
        """Pictures [B, 3, 32, 32] in 0 to 1, on the CPU."""
        images: torch.Tensor = self.pipe(
            self.prompts, num_inference_steps=steps, latents=self.noise, output_type="pt"
        ).images
        return images.cpu()

    def cached(self, configuration: Configuration) -> AbstractContextManager[None]:
        """The pipeline with the configuration's cache on."""
        if configuration.cache is None:
            return nullcontext()
        return _Cached(self.pipe, configuration)

    def first_run(self, configuration: Configuration) -> Result:
        """Draw once, and take down the pictures and the decisions."""
        with self.cached(configuration):
            images = self.draw(configuration.steps)
            if configuration.cache is None:
                computed = [StepRecord(step, False, None, "no cache") for step in range(configuration.steps)]
                return Result(configuration, images, BranchStats(computed))
            (stats,) = cachedit.summary(self.pipe, logging=False)
        return Result(configuration, images, stats.main)

    def time(self, result: Result, baseline_steps: int) -> None:
        """Time one round: the plain model, the configuration, and the oracle that knows its decisions."""
        configuration = result.configuration
        reused = set(result.stats.reused_steps)
        decisions = [step not in reused for step in range(configuration.steps)]
        result.baseline_seconds.append(self._seconds(baseline_steps))

        def cached() -> None:
            with self.cached(configuration):
                self.draw(configuration.steps)  # buffers are allocated once, not in each request
                result.seconds.append(self._seconds(configuration.steps))

        def ideal() -> None:
            with oracle(self.pipe.transformer, decisions, FIRST_BLOCKS):
                result.oracle_seconds.append(self._seconds(configuration.steps))

        for run_one in (cached, ideal) if len(result.seconds) % 2 == 0 else (ideal, cached):
            run_one()

    def _seconds(self, steps: int) -> float:
        _synchronize(self.pipe.device)
        start = time.perf_counter()
        self.draw(steps)
        _synchronize(self.pipe.device)
        return time.perf_counter() - start


class _Cached:
    def __init__(self, pipe: Any, configuration: Configuration):
        self.pipe, self.configuration = pipe, configuration

    def __enter__(self) -> None:
        cachedit.enable_cache(self.pipe, self.configuration.cache, self.configuration.calibrator)

    def __exit__(self, *exc: object) -> None:
        cachedit.disable_cache(self.pipe)


def run(
    steps: int = 28,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path = Path("demo"),
    rounds: int = 11,
) -> dict[str, Any]:
    """Run the demo and return what it wrote to ``report.json``.

    Raises:
        ValueError: For a prompt that the embedded model's grammar does not cover, or a device that is not there.
        OSError: If ``out`` cannot be written.
    """
    console = Console() if sys.stdout.isatty() else Console(width=120)  # piped: nothing to wrap the table for
    chosen, place = _choose_prompts(prompts), _choose_device(device)
    out.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of loading
    pipe = load_pipeline(device=place)
    pipe.set_progress_bar_config(disable=True)
    demo = Demo(pipe, chosen, seed)
    console.print(
        f"pictures: {len(chosen)}, steps: {steps}, {_device_name(place)}, {torch.get_num_threads()} threads, "
        f"operators: {cachedit_kernels.backends()['residual_forecast'][torch.device(place).type].implementation}"
    )
    baseline = demo.first_run(Configuration("baseline", steps))
    with _quiet():  # a cache that never triggers is what is wanted here
        every_step = demo.first_run(_measure_only(steps))
    with _progress(console) as progress:
        results = _measure(demo, steps, rounds, progress)
    for result in results:
        result.quality = compare(result.images, baseline.images)
    report = {
        "steps": steps,
        "prompts": chosen,
        "seed": seed,
        "device": _device_name(place),
        "torch": torch.__version__,
        "baseline_seconds": statistics.median(s for result in results for s in result.baseline_seconds),
        "configurations": {result.configuration.name: result.as_dict() for result in results},
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    rows = [("baseline", baseline.images), *((result.configuration.name, result.images) for result in results)]
    figures.draw_images(out / "images.png", rows, chosen)
    figures.draw_steps(out / "steps.png", [r for r in results if r.configuration.cache], every_step.stats.diffs)
    console.print(_table(report))
    console.print(f"wrote {out / 'images.png'}, {out / 'steps.png'} and {out / 'report.json'}")
    return report


def _measure(demo: Demo, steps: int, rounds: int, progress: Progress) -> list[Result]:
    """All configurations, in turn in each round, so that a slow minute of the machine falls on all of them."""

    def first(configuration: Configuration) -> tuple[Result, TaskID]:
        task = progress.add_task(configuration.name, total=rounds + 1)
        result = demo.first_run(configuration)
        progress.advance(task)
        return result, task

    measured = [first(configuration) for configuration in configurations(steps)]
    fewest = min(len(result.stats.computed_steps) for result, _ in measured)
    measured.append(first(Configuration(f"plain model, {fewest} steps", fewest)))
    for _ in range(rounds):
        for result, task in measured:
            demo.time(result, steps)
            progress.advance(task)
    return [result for result, _ in measured]


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("cachedit")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _measure_only(steps: int) -> Configuration:
    """Measures every step and reuses none: no difference is below the smallest float."""
    config = DBCacheConfig(Fn_compute_blocks=FIRST_BLOCKS, max_warmup_steps=0, residual_diff_threshold=5e-324)
    return Configuration("every step measured", steps, config)


def _choose_prompts(prompts: Sequence[str] | None) -> list[str]:
    if not prompts:
        return list(PROMPTS)
    if len(prompts) == 1 and prompts[0].lstrip("-").isdigit():
        count = int(prompts[0])
        if not 1 <= count <= len(PROMPTS):
            raise ValueError(f"--prompts: there are 1 to {len(PROMPTS)} built-in prompts, got {count}")
        return list(PROMPTS[:count])
    return list(prompts)


def _choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _table(report: dict[str, Any]) -> Table:
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("seconds", lambda row: f"{row['seconds']:.3f}"),
        ("speedup", lambda row: f"{row['speedup']:.2f}x"),
        ("ideal", lambda row: f"{row['ideal_speedup']:.2f}x"),
        ("of ideal", lambda row: f"{row['efficiency']:.1%}"),
        ("computed", lambda row: str(row["computed_steps"])),
        ("reused", lambda row: str(row["reused_steps"])),
        ("PSNR dB", lambda row: _decibels(row["psnr_db"])),
        ("min", lambda row: _decibels(row["psnr_db_min"])),
        ("SSIM", lambda row: f"{row['ssim']:.4f}"),
    ]
    table = Table(title="compared with the baseline; times are medians of alternating runs", box=SIMPLE)
    table.add_column("configuration", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("baseline", f"{report['baseline_seconds']:.3f}", "1.00x", "", "", str(report["steps"]), "0")
    for name, row in report["configurations"].items():
        table.add_row(name, *(show(row) for _, show in columns))
    return table


def _decibels(value: float | None) -> str:
    return "same" if value is None else f"{value:.1f}"
