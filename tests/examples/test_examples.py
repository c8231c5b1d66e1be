"""Every example runs, and says what it should."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from stand_ins import embedded

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_custom_pipeline(tmp_path):
    assert run("custom_pipeline.py", tmp_path).count("| Denoiser.blocks | default | 28 ") == 2


def test_bagel_shape(tmp_path):
    text = run("bagel_shape.py", tmp_path)
    for branch in ("cond  ", "uncond"):  # 28 steps each, 18 of them reused
        assert f"| Backbone.layers | {branch} | 28    | 18 " in text
    error = float(text.partition("against the uncached run: ")[2].split()[0])
    assert 1e-5 < error < 0.05


def test_embedded_model(tmp_path):
    text = run("embedded_model.py", tmp_path)
    assert "| cond   | 28    | 17 " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cached-0.png",
        "cached-1.png",
        "plain-0.png",
        "plain-1.png",
    ]


def test_own_policy(tmp_path):
    text = run("own_policy.py", tmp_path)
    assert text.count("| reused ") > 10 and text.count("GrowingBudget") == 27


def test_diffusers_flux(tmp_path, monkeypatch, capsys):
    """With the embedded model in place of FLUX."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", embedded)
    monkeypatch.setattr(sys, "argv", ["diffusers_flux.py", "--steps", "20"])
    runpy.run_path(str(EXAMPLES / "diffusers_flux.py"), run_name="__main__")
    assert "| 20 " in capsys.readouterr().out and (tmp_path / "flux.png").stat().st_size


@pytest.mark.slow
def test_parallel(tmp_path):
    """On two ranks, over gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*launch, "--rdzv-endpoint", "localhost:0", EXAMPLES / "parallel.py", "--steps", "12"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| 12 " in done.stdout and (tmp_path / "parallel.png").stat().st_size


WITHOUT = """
import importlib.abc, runpy, sys

BLOCKED = {"accelerate", "cache_dit", "diffusers", "safetensors", "transformers", "yaml"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
runpy.run_path(sys.argv[1], run_name="__main__")
assert not BLOCKED & set(sys.modules)
"""


@pytest.mark.parametrize("name", ["transformer_only.py", "custom_pipeline.py"])
def test_torch_is_all_that_is_needed(tmp_path, name):
    (tmp_path / "without.py").write_text(WITHOUT)
    command = [sys.executable, tmp_path / "without.py", EXAMPLES / name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error = float(done.stdout.partition("against the uncached run: ")[2].split()[0])
    assert 1e-4 < error < 0.05
    if name == "transformer_only.py":
        reused = [int(line.split()[1]) for line in done.stdout.splitlines() if "cond: " in line]
        assert len(reused) == 2 and min(reused) > 5


def test_none_is_left_out():
    tests = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests] == []
