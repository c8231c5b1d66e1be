"""The examples that need nothing from outside run, and say what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_compiles(path):
    compile(path.read_text(), str(path), "exec")
