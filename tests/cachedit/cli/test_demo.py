import json

import pytest
import torch
from typer.testing import CliRunner

from cachedit.cli import demo, quality
from cachedit.cli.app import app

CONFIGURATIONS = ["DBCache", "DBCache + TaylorSeer", "DBCache + TaylorSeer + mask"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    result = invoke("--steps", 12, "--prompts", 2, "--rounds", 3, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_report(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    assert report["baseline_seconds"] > 0 and report["steps"] == 12 and len(report["prompts"]) == 2
    rows = report["configurations"]
    plain = [name for name in rows if name not in CONFIGURATIONS]
    assert list(rows) == [*CONFIGURATIONS, *plain] and len(plain) == 1
    for name in CONFIGURATIONS:
        row = rows[name]
        assert row["computed_steps"] + row["reused_steps"] == 12 and row["reused_steps"] == len(row["steps_reused"])
        assert row["reused_steps"] > 0
        assert row["psnr_db_min"] <= row["psnr_db"] and 0 < row["ssim"] <= 1
    for row in rows.values():
        assert len(row["rounds"]) == 3
        for key in ("seconds", "speedup", "ideal_speedup", "efficiency", "psnr_db", "psnr_db_min", "ssim"):
            assert row[key] > 0
    fewest = min(rows[name]["computed_steps"] for name in CONFIGURATIONS)
    assert rows[plain[0]]["computed_steps"] == fewest and rows[plain[0]]["reused_steps"] == 0
    assert plain[0] == f"plain model, {fewest} steps"


def test_mask_row_follows_the_mask(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    row = report["configurations"]["DBCache + TaylorSeer + mask"]
    assert row["steps_reused"] == [i for i, bit in enumerate(demo.demo_mask(12)) if not bit]


def test_pictures_are_drawn(finished):
    from PIL import Image

    for name in ("images.png", "steps.png"):
        picture = Image.open(finished[0] / name).convert("L")
        assert picture.width > 400 and picture.height > 300
        assert len(set(picture.resize((64, 64)).tobytes())) > 10


def test_output_names_every_row(finished):
    for name in [*CONFIGURATIONS, "baseline", "plain model"]:
        assert name in finished[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "4"], "--steps"),
        (["--prompts", "a red elephant"], "elephant"),
        (["--prompts", "99"], "1 to 8 built-in prompts, got 99"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--out", "/dev/null/demo"], "/dev/null"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_bad_options(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert message in text and "Traceback" not in text


def test_quality_of_equal_and_different_pictures():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same = quality.compare(images, images)
    assert same.as_dict() == {"psnr_db": None, "psnr_db_min": None, "ssim": pytest.approx(1.0)}
    other = images.clone()
    other[1] = (other[1] + 0.1).clamp(0, 1)
    other[0] += 0.001
    other[2] += 0.001
    result = quality.compare(other, images)
    mse = ((other[1] - images[1]) ** 2).mean()
    assert result.psnr_db_min == pytest.approx(-10 * torch.log10(mse).item(), abs=1e-3)
    assert result.psnr_db_min < result.psnr_db < 60


def test_mask_of_the_demo():
    assert "".join(map(str, demo.demo_mask(28))) == "1100100010001000100010010101"
    for steps in range(8, 60):
        mask = demo.demo_mask(steps)
        assert len(mask) == steps and mask[0] == mask[-1] == 1 and sum(mask) < steps


def test_prompts_can_be_given_or_counted():
    assert demo._choose_prompts(None) == list(demo.PROMPTS)
    assert demo._choose_prompts(["3"]) == list(demo.PROMPTS[:3])
    assert demo._choose_prompts(["a red circle", "a blue ring"]) == ["a red circle", "a blue ring"]
