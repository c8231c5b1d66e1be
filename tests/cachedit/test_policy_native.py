"""csrc/policy.h, which decides on the device, against the engine: the same verdict, slot and weights at every step."""

from __future__ import annotations

import importlib.util
import logging
import math
import multiprocessing
import random
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cachedit import DBCacheConfig, metric
from cachedit_kernels.graphs import REASONS
from decisions import NOT_STORED, RELEASE, RESTART, STEP_SKIPPED, STREAMS_CHANGED, by_the_engine
from native import build, needs_compiler

SCHEDULES = 100_000

pytestmark = needs_compiler


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("policy_native", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "policy_native.so"
    pybind11 = Path(torch.__file__).parent / "include"
    build(path, "tests/native/policy.cpp", includes=(pybind11, sysconfig.get_paths()["include"]))
    return path


@pytest.fixture(scope="module")
def native(library: Path) -> ModuleType:
    return load(library)


def schedule(seed: int) -> tuple[dict[str, Any], int | None, int, list[float], list[int]]:
    """A configuration, the request's steps if known, TaylorSeer's order, and per step its difference and events."""
    rng = random.Random(seed)
    steps = rng.choice((1, 2, 4, 6, 8, 12, 20, 20, 28))
    settings: dict[str, Any] = {
        "residual_diff_threshold": rng.choice((0.1, 0.1, 0.1, 0.3, 0.3, math.inf, 0.0, -1.0)),
        "max_accumulated_residual_diff_threshold": rng.choice((None, None, 0.15, 0.4, 0.0, math.inf)),
        "max_warmup_steps": rng.choice((0, 0, 1, 3, 8)),
        "warmup_interval": rng.choice((1, 1, 2, 3)),
        "max_cached_steps": rng.choice((-1, -1, 0, 1, 3, 6)),
        "max_continuous_cached_steps": rng.choice((-1, -1, 0, 1, 2, 5)),
        "steps_computation_policy": rng.choice(("static", "dynamic")),
        "force_refresh_step_hint": rng.choice((None, None, None, 1, 3, 7)),
        "force_refresh_step_policy": rng.choice(("once", "repeat")),
    }
    total = None
    masked = rng.random()
    if masked < 0.3:
        settings["steps_computation_mask"] = [int(rng.random() < 0.4) for _ in range(rng.randint(1, steps + 3))]
    elif masked < 0.4 and steps >= 8:
        settings["steps_computation_mask"], total = rng.choice(("slow", "medium", "fast", "ultra")), steps
    diffs = [rng.choice((0.0, 0.03, 0.08, 0.1, 0.2, rng.random() / 4)) for _ in range(steps)]
    events = [0] * steps
    if rng.random() < 0.3:
        diffs[rng.randrange(steps)] = rng.choice((math.nan, math.inf, -math.inf))
    if rng.random() < 0.3:
        events[rng.randrange(steps)] |= rng.choice((RESTART, RELEASE, STREAMS_CHANGED, NOT_STORED))
    if rng.random() < 0.3:
        events[rng.randrange(steps)] |= STEP_SKIPPED
    return settings, total, rng.randint(0, 4), diffs, events


def natively(
    native: ModuleType, settings: dict[str, Any], total: int | None, order: int, diffs: list[float], events: list[int]
) -> tuple[list[Any], int]:
    """The same by csrc/policy.h."""
    config = DBCacheConfig(**settings)
    rules = native.make_rules(
        config.residual_diff_threshold,
        config.max_accumulated_residual_diff_threshold or 0.0,
        config.max_cached_steps,
        config.max_continuous_cached_steps,
        config.max_warmup_steps,
        config.warmup_interval,
        config.force_refresh_step_hint or 0,
        config.force_refresh_step_policy == "repeat",
        config.resolve_mask(total) or [],
        config.steps_computation_policy == "static",
        order,
    )
    rows, nonfinite = native.run(rules, diffs, events)
    return [
        (
            step,
            reused,
            diff,
            REASONS[reason],
            None if reused or event & NOT_STORED else slot,
            weights if reused else None,
        )
        for (step, reused, diff, reason, slot, weights), event in zip(rows, events)
    ], nonfinite


def alike(ours: Any, expected: Any) -> bool:
    """Equal; of weights to 1e-12 (sum() adds floats in a better way from Python 3.12 on), and NaN equals NaN."""
    *rest, weights = ours
    *expected_rest, expected_weights = expected
    if weights != expected_weights and not (
        weights is not None
        and expected_weights is not None
        and all(math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12) for a, b in zip(weights, expected_weights))
    ):
        return False
    return rest == expected_rest or repr(rest) == repr(expected_rest)


def compare(library: Path, seeds: range) -> dict[tuple[str, bool], int]:
    """Compare the schedules of these seeds; return how often each reason, and verdict for it, came up."""
    logging.disable(logging.WARNING)  # that streams have changed within a request
    torch.set_num_threads(1)
    native = load(library)
    seen: dict[tuple[str, bool], int] = {}
    for seed in seeds:
        played = schedule(seed)
        expected, expected_nonfinite = by_the_engine(*played)
        ours, nonfinite = natively(native, *played)
        assert len(ours) == len(expected) and nonfinite == expected_nonfinite, f"seed {seed}"
        for row, expected_row in zip(ours, expected):
            assert alike(row, expected_row), f"seed {seed}: {played}\n{row}\nexpected {expected_row}"
            key = expected_row[3], expected_row[1]
            seen[key] = seen.get(key, 0) + 1
    return seen


@pytest.mark.slow
def test_random_schedules(library: Path) -> None:
    chunks = [range(start, start + 5_000) for start in range(0, SCHEDULES, 5_000)]
    seen: dict[tuple[str, bool], int] = {}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for counts in pool.map(compare, [library] * len(chunks), chunks):
            for key, count in counts.items():
                seen[key] = seen.get(key, 0) + count
    verdicts = {(reason, False) for reason in REASONS} | {("mask", True), ("diff", True)}
    assert set(seen) == verdicts and min(seen.values()) > 1000, seen


@pytest.mark.parametrize("moved", [0.0, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("size", [0.0, 3.0, 1e-45, math.inf, math.nan])
def test_relative_difference_of_sums(native: ModuleType, moved: float, size: float) -> None:
    (expected,) = metric.relative(torch.tensor([[moved, size]]))
    ours = native.relative(moved, torch.tensor(size).item())
    assert ours == expected or (math.isnan(ours) and math.isnan(expected))


def test_mask_that_is_too_long_is_refused(native: ModuleType) -> None:
    limits = (0.1, 0.0, -1, -1, 8, 1, 0, False)
    longest = native.make_rules(*limits, [1] * 4 + [0] * (native.MAX_MASK - 4), True, 0)
    assert longest.warmup == 4
    with pytest.raises(ValueError, match="mask is too long"):
        native.make_rules(*limits, [1] * (native.MAX_MASK + 1), True, 0)
