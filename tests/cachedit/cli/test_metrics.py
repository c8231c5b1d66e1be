import csv
import re

import numpy
import pytest
from PIL import Image
from typer.testing import CliRunner

from cachedit import metrics
from cachedit.cli import metrics as command
from cachedit.cli.app import app
from cachedit.metrics import weights
from pictures import TEST, TRUE, save, save_video


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A baseline, and three others at growing distances; no weights anywhere."""
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    save(tmp_path / "runs" / "base", TRUE)
    for name, scale in (("near", 1), ("far", 4), ("middle", 2)):
        noise = (TEST.astype(int) - TRUE) * scale
        save(tmp_path / "runs" / name, numpy.clip(TRUE + noise, 0, 255).astype(numpy.uint8))
    return tmp_path / "runs"


def run(capsys, *arguments):
    assert command.run(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_both_commands_are_one(folders):
    arguments = ["psnr", "mse", "-i1", str(folders / "base"), "-i2", str(folders / "near"), "-table"]
    result = CliRunner().invoke(app, ["metrics", *arguments])
    expected = [metrics.compute_psnr(folders / "base", folders / "near")[0],
                metrics.compute_mse(folders / "base", folders / "near")[0]]  # fmt: skip
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "| compared | count | psnr ↑ | mse ↓ |"
    assert result.stdout.splitlines()[2] == f"| near | 3 | {expected[0]:.2f} | {expected[1]:.3f} |"
    with pytest.raises(SystemExit) as left:
        metrics.main(arguments)
    assert left.value.code == 0


def test_a_table_of_several_with_the_best_on_top(folders, capsys, tmp_path):
    flags = ["--csv", tmp_path / "a.csv", "--markdown", tmp_path / "a.md"]
    text = run(capsys, "mse", "ssim", "-d", folders, "-r", folders / "base", *flags)
    assert re.findall(r"near|middle|far|base", text) == ["near", "middle", "far"]
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["compared"] for row in rows] == ["near", "middle", "far"]
    for row in rows:
        assert float(row["ssim"]) == metrics.compute_ssim(folders / "base", folders / row["compared"])[0]
    assert (tmp_path / "a.md").read_text().startswith("| compared | count | mse ↓ | ssim ↑ |\n| --- | ---: |")


def test_all_says_what_is_left_out(folders, capsys):
    text = run(capsys, "all", "-i1", folders / "base", "-i2", folders / "near")
    assert re.search(r"compared +count +psnr ↑ +ssim ↑ +mse ↓ *\n", text)
    assert "lpips is left out: LPIPS needs the file alexnet" in text
    assert "fid is left out: FID needs the file inception" in text


def test_videos(tmp_path, capsys):
    true, test = save_video(tmp_path / "true.gif", TRUE), save_video(tmp_path / "other.gif", TEST)
    value, count = metrics.compute_psnr(true, test)
    for arguments in (("-v1", true, "-v2", test), ("-vd", tmp_path, "-rv", true)):
        assert f"| other.gif | {count} | {value:.2f} |" in run(capsys, "psnr", "-table", *arguments)


def test_numbers_from_a_log(folders, capsys, tmp_path):
    (tmp_path / "log").write_text("base cuda Time: 8.0\nnear cuda time: 4.0\nnear cuda time: 2.0\nnear cpu time: 90\n")
    log = ("-plog", tmp_path / "log", "-ptags", "time", "TFLOPs", "-extra-ptags", "cuda", "--cal-speedup")
    text = run(capsys, "psnr", "-d", folders, "-r", folders / "base", "-table", *log)
    assert "| time | time speedup | TFLOPs | TFLOPs speedup |" in text
    assert re.search(r"\| near \| 3 \| \S+ \| 3.00 \| 2.67 \|  \|  \|", text)
    assert re.search(r"\| far \| 3 \| \S+ \|  \|  \|  \|  \|", text)


def test_the_worst_pairs_are_drawn(folders, capsys, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(command.report, "_draw", lambda path, pairs, titles: drawn.append((pairs, titles)))
    run(capsys, "psnr", "-d", folders, "-r", folders / "base", "--worst", tmp_path / "w.png", "--worst-count", 2)
    ((pairs, titles),) = drawn
    values = sorted((metrics.compute_psnr(a, TRUE[i])[0], name) for i, name in enumerate(("a.png", "b.png", "c.png"))
                    for a in [numpy.asarray(Image.open(folders / "far" / name))])  # fmt: skip
    assert titles == [f"far: {name}\npsnr {value:.4g}" for value, name in values[:2]]
    assert [metrics.compute_psnr(*(x.permute(1, 2, 0).numpy() for x in pair[1:]))[0] for pair in pairs] == (
        pytest.approx([value for value, _ in values[:2]])
    )


def test_the_picture_of_the_worst_pairs(folders, capsys, tmp_path):
    flags = ("--worst", tmp_path / "worst.png", "-verbose")
    assert "far" in run(capsys, "mse", "-i1", folders / "base", "-i2", folders / "far", *flags)
    picture = Image.open(tmp_path / "worst.png").convert("L")
    assert picture.width > 800 and picture.height > 800 and len(set(picture.resize((64, 64)).tobytes())) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["psnr"], "nothing to compare: give -i1 and -i2"),
        (["psnr", "-i1", "nowhere", "-i2", "{base}"], "there is no file or folder nowhere"),
        (["lpips", "-i1", "{base}", "-i2", "{near}"], "LPIPS needs the file alexnet"),
        (["psnr", "-p", "{base}/a.png", "-i2", "{near}"], "psnr needs a baseline"),
        (["clip_score", "-i1", "{base}", "-i2", "{near}"], "clip_score needs prompts"),
        (["blur", "-i1", "{base}", "-i2", "{near}"], "invalid choice: 'blur'"),
    ],
)
def test_wrong_arguments(folders, capsys, arguments, message):
    places = {"base": folders / "base", "near": folders / "near"}
    with pytest.raises(SystemExit) as left:
        command.run([argument.format(**places) for argument in arguments])
    assert left.value.code == 2 and message in capsys.readouterr().err
