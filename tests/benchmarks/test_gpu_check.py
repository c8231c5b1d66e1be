"""gpu_check.sh without a GPU: a rehearsal of every command, and what happens when one fails or hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")


def check(out: Path, *parts: str, **overrides: str) -> subprocess.CompletedProcess[str]:
    defaults = {"OUT": str(out), "DEVICE": "cpu", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "CACHEDIT_"))}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), *parts]
    return subprocess.run(command, env=environment | defaults | overrides, capture_output=True, text=True, timeout=280)


def summary(result: subprocess.CompletedProcess[str]) -> list[str]:
    return result.stdout.split("=== summary")[1].splitlines()[1:]


@pytest.mark.slow
def test_the_rehearsal_runs_everything_without_diffusers(tmp_path: Path) -> None:
    """Packages that machines with GPUs may lack are hidden."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_spec(cls, name, path=None, target=None):\n"
        "    if name.split('.')[0] not in ('diffusers', 'cache_dit', 'transformers', 'peft', 'torchao'):\n"
        "        return find(name, path, target)\n"
        "PathFinder.find_spec = classmethod(find_spec)\n"
    )
    out = tmp_path / "out"
    result = check(out, "tests", "operators", "pipelines", "demo", PYTHONPATH=str(hidden))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    lines = summary(result)
    assert not [line for line in lines if line.startswith("FAILED")]
    assert {"skipped  pipelines: all of it (diffusers is not installed)"} < set(lines)
    files = {path.name for path in out.iterdir()}
    figures = {"operators.csv", "exchange.csv", "engine.csv", "startup.csv"}
    assert files == {"environment.log", "tests.log", "operators.log"} | figures
    tests = (out / "tests.log").read_text().splitlines()[-1]
    assert "skipped" in tests and "failed" not in tests and "error" not in tests
    for name in figures:
        assert len((out / name).read_text().splitlines()) > 2


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    """With a Python whose benchmark of forecasts hangs and whose other benchmarks fail."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1" in *bench_forecast*) exec sleep 60;; *bench_*) echo cannot; exit 3;; esac\necho "$@"\n'
    )
    python.chmod(0o755)
    result = check(tmp_path / "out", "operators", PYTHON=str(python), LIMIT="3")
    lines = summary(result)
    assert result.returncode == 1
    assert lines[0].startswith("passed   environment: Python and GPU")
    failed = [line for line in lines if line.startswith("FAILED")]
    assert "operators: residual, cpp (0 s, status 3)" in failed[0]
    assert "operators: forecast, cpp" in failed[1] and "out of time" in failed[1]
    assert failed[-1] == "FAILED   operators: residual, torch.compile (no time left)" and len(failed) == 8
    assert "cannot" in (tmp_path / "out" / "operators.log").read_text()


def test_without_a_gpu_or_with_an_unknown_part_nothing_runs(tmp_path: Path) -> None:
    result = check(tmp_path / "out", "operators", DEVICE="cuda")
    assert result.returncode == 1 and "no CUDA device" in result.stdout
    assert [line.split()[0] for line in summary(result)] == ["FAILED"]
    assert check(tmp_path, "test").returncode == 2
