"""The operator benchmarks run to the end at a small size and leave rows that can be read."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATORS = {
    "bench_residual.py": ["residual_l1", "l1"] + ["residual_push"] * 3 + ["residual_push_float8"],
    "bench_forecast.py": ["residual_forecast", "residual_forecast_float8"] * 3 + ["ring_gram"] * 2,
}


def test_benchmarks_add_rows_to_one_history(tmp_path: Path) -> None:
    history = tmp_path / "history" / "operators.csv"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for script in OPERATORS:
        command = [sys.executable, ROOT / "benchmarks" / script, "--device", "cpu", "--mb", "0.1", "--dtype", "float32"]
        command += ["--rounds", "1", "--no-compile", "--csv", history]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    with history.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["operator"] for row in rows] == [operator for names in OPERATORS.values() for operator in names]
    for row in rows:
        assert all(row[column] for column in ("date", "device", "torch", "backend")) and row["dtype"] == "float32"
        assert all(float(row[column]) > 0 for column in ("ours_ms", "eager_ms", "copy_ms", "ours_gbps"))


def test_engine_benchmark_counts_operators(tmp_path: Path) -> None:
    history = tmp_path / "engine.csv"
    command = [sys.executable, ROOT / "benchmarks" / "bench_engine.py", "--device", "cpu", "--rounds", "1"]
    subprocess.run([*command, "--csv", history], check=True, capture_output=True)
    with history.open() as file:
        rows = {(row["engine"], row["step"]): row for row in csv.DictReader(file)}
    steps = {"computed": "2", "reused": "2", "reused, static mask": "1"}
    assert {step: rows["cachedit", step]["operators"] for step in steps} == steps
    assert int(rows["FirstBlockCache", "reused"]["operators"]) > 2
    assert all(float(row["microseconds"]) > 0 for row in rows.values())


def test_startup_benchmark_runs(tmp_path: Path) -> None:
    history = tmp_path / "startup.csv"
    command = [sys.executable, ROOT / "benchmarks" / "bench_startup.py", "--device", "cpu", "--processes", "1"]
    subprocess.run([*command, "--csv", history], check=True, capture_output=True)
    with history.open() as file:
        rows = {(row["engine"], row["operators"]): row for row in csv.DictReader(file)}
    assert {("cachedit", "cpp"), ("cachedit", "reference")} <= set(rows)
    for row in rows.values():
        parts = [float(row[f"{part}_ms"]) for part in ("import", "enable", "first", "second")]
        assert all(ms > 0 for ms in parts) and abs(sum(parts) - float(row["total_ms"])) < 0.3


def test_compile_benchmark_runs(tmp_path: Path) -> None:
    history = tmp_path / "compile.csv"
    command = [sys.executable, ROOT / "benchmarks" / "bench_compile.py", "--csv", history]
    command += ["--steps", "4", "--batch", "1", "--rounds", "1", "--backend", "eager"]
    subprocess.run(command, check=True, capture_output=True)
    with history.open() as file:
        rows = {(row["cache"], row["compiled"]): row for row in csv.DictReader(file)}
    ours = rows["cachedit", "True"]
    assert (ours["graphs"], ours["breaks"]) == ("2", "0")
    assert all(float(row["seconds"]) > 0 for row in rows.values())


@pytest.mark.slow
def test_pipelines_benchmark_runs(tmp_path: Path) -> None:
    history = tmp_path / "pipelines.csv"
    command = [sys.executable, ROOT / "benchmarks" / "bench_pipelines.py", "--tiny", "--models", "Wan 2.1 1.3B"]
    command += ["--steps", "5", "--rounds", "1", "--device", "cpu", "--backend", "eager"]
    subprocess.run([*command, "--caches", "cachedit", "FirstBlockCache", "--csv", history], check=True)
    with history.open() as file:
        rows = {(row["cache"], row["compiled"]): row for row in csv.DictReader(file)}
    caches = ("none", "ideal", "cachedit", "FirstBlockCache")
    assert set(rows) == {(cache, compiled) for cache in caches for compiled in ("False", "True")}
    for (cache, _), row in rows.items():
        assert row["computed"] == ("5" if cache == "none" else "4") and float(row["seconds"]) > 0
        assert float(row["syncs"]) == (0.8 if cache == "FirstBlockCache" else 0)  # it measures all steps but the first
        full = float(rows["none", row["compiled"]]["kernels"])
        assert float(row["kernels"]) == full if cache == "none" else float(row["kernels"]) < full


@pytest.mark.slow
def test_policies_benchmark_runs(tmp_path: Path) -> None:
    history = tmp_path / "policies.csv"
    command = [sys.executable, ROOT / "benchmarks" / "bench_policies.py", "--csv", history]
    subprocess.run([*command, "--steps", "10", "--prompts", "2", "--rounds", "1"], check=True, capture_output=True)
    with history.open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["plain model, 10 steps"]["skipped"] == "0.0%"
    assert float(rows["mask, TaylorSeer 1"]["psnr_db"]) > 20 and float(rows["mask, plain reuse"]["ms"]) > 0
