"""The operator benchmarks run to the end at a small size and leave rows that can be read."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

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


def test_gpu_check_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu_check.sh"], check=True)
