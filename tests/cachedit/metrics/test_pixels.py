"""PSNR, SSIM and MSE: the values of scikit-image, over arrays, files, folders and videos."""

import importlib.util
import logging
import math
import sys
import types

import numpy
import pytest
from PIL import Image, ImageSequence
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from cachedit import metrics
from pictures import TEST, TRUE, save, save_video

GAUSSIAN = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5}
EXPECTED = {
    metrics.compute_psnr: peak_signal_noise_ratio,
    metrics.compute_mse: mean_squared_error,
    metrics.compute_ssim: lambda a, b: structural_similarity(a, b, channel_axis=2, data_range=255, **GAUSSIAN),
}
# scikit-image leaves out the 5 pixels at the borders of its windows of 11; torchmetrics mirrors the picture there.
BORDERS = 1e-3
ALL = pytest.mark.parametrize("metric", list(EXPECTED), ids=lambda metric: metric.__name__)


def tolerance(metric):
    return BORDERS if metric is metrics.compute_ssim else 0


@ALL
def test_arrays(metric):
    value, count = metric(TRUE[0], TEST[0])
    assert count == 1 and value == pytest.approx(EXPECTED[metric](TRUE[0], TEST[0]), rel=1e-4, abs=tolerance(metric))


@ALL
def test_files_and_folders(tmp_path, metric):
    true, test = save(tmp_path / "true", TRUE), save(tmp_path / "test", TEST)
    single = [EXPECTED[metric](a, b) for a, b in zip(TRUE, TEST)]
    assert metric(f"{true}/b.png", f"{test}/b.png") == (pytest.approx(single[1], rel=1e-4, abs=tolerance(metric)), 1)
    assert metric(true, test) == (pytest.approx(sum(single) / 3, rel=1e-4, abs=tolerance(metric)), 3)


def test_files_of_one_name_go_together(tmp_path, caplog):
    true = save(tmp_path / "true", TRUE, ("a.png", "deep/c.png", "x.png"))
    test = save(tmp_path / "test", TEST[:2], ("deep/c.png", "d.png"))
    with caplog.at_level(logging.WARNING, logger="cachedit.metrics"):
        assert metrics.compute_mse(true, test) == (pytest.approx(mean_squared_error(TRUE[1], TEST[0]), rel=1e-4), 1)
    assert "lacks 2 of the 3 files" in caplog.text


def test_equal_pictures(tmp_path):
    assert metrics.compute_psnr(TRUE[0], TRUE[0]) == (math.inf, 1)
    assert metrics.compute_mse(TRUE[0], TRUE[0]) == (0, 1)
    true, test = save(tmp_path / "true", TRUE), save(tmp_path / "test", numpy.stack([TRUE[0], *TEST[1:]]))
    others = [peak_signal_noise_ratio(TRUE[i], TEST[i]) for i in (1, 2)]
    assert metrics.compute_psnr(true, test) == (pytest.approx(sum(others) / 2, rel=1e-4), 3)


def test_large_differences(monkeypatch):
    """cache_dit squares them as uint8 by default; on small ones, and by scikit-image, it says the same."""
    pytest.importorskip("cache_dit")
    for name in ("cv2", "lpips"):  # which it imports, and does not use for arrays
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    theirs = importlib.import_module("cache_dit.metrics.metrics")
    small, large = TEST[0], numpy.clip(TRUE[0].astype(int) + 4 * (TEST[0].astype(int) - TRUE[0]), 0, 255)
    assert metrics.compute_psnr(TRUE[0], small)[0] == pytest.approx(theirs.compute_psnr(TRUE[0], small)[0], rel=1e-4)
    value = metrics.compute_psnr(TRUE[0], large.astype(numpy.uint8))[0]
    assert value < theirs.compute_psnr(TRUE[0], large.astype(numpy.uint8))[0] - 1
    monkeypatch.setattr(theirs, "PSNR_TYPE", "skimage")
    assert value == pytest.approx(theirs.compute_psnr(TRUE[0], large.astype(numpy.uint8))[0], rel=1e-4)


def frames(path):
    return [numpy.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(path))]


@ALL
def test_videos(tmp_path, metric):
    true, test = save_video(tmp_path / "true" / "v.gif", TRUE), save_video(tmp_path / "test" / "v.gif", TEST)
    single = [EXPECTED[metric](a, b) for a, b in zip(frames(true), frames(test))]
    assert len(single) == 3
    assert metric(true, test) == (pytest.approx(sum(single) / 3, rel=1e-4, abs=tolerance(metric)), 3)
    assert metric(str(tmp_path / "true"), str(tmp_path / "test")) == metric(true, test)


needs_reader = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("imageio_ffmpeg", "av")),
    reason="no reader of videos: pip install 'cachedit-kernels[video]'",
)


@needs_reader
@ALL
def test_mp4_files(tmp_path, metric):
    """As good as its own frames; what the codec loses is part of what is compared."""
    imageio = pytest.importorskip("imageio.v3")
    smooth = numpy.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3)
    true = numpy.stack([numpy.roll(smooth, 8 * i, 1) for i in range(5)]).astype(numpy.uint8)
    test = numpy.clip(true + numpy.random.default_rng(0).normal(0, 12, true.shape), 0, 255).astype(numpy.uint8)
    for name, frames in (("a.mp4", true), ("b.mp4", test)):
        imageio.imwrite(tmp_path / name, frames, fps=8)
    read = [list(imageio.imiter(tmp_path / name)) for name in ("a.mp4", "b.mp4")]
    single = [EXPECTED[metric](a, b) for a, b in zip(*read)]
    assert len(single) == 5 and peak_signal_noise_ratio(read[0][2], true[2]) > 25
    value, count = metric(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert count == 5 and value == pytest.approx(sum(single) / 5, rel=1e-3, abs=2 * tolerance(metric))


@pytest.mark.parametrize(
    ("reader", "error", "message"),
    [
        (None, ImportError, r"broken.mp4 could not be opened; .* imageio-ffmpeg or av: pip install '\S+\[video\]'$"),
        ("found", ValueError, "broken.mp4 cannot be read as a video: "),
    ],
)
def test_a_video_that_cannot_be_read(tmp_path, monkeypatch, reader, error, message):
    broken, find = tmp_path / "broken.mp4", importlib.util.find_spec
    broken.write_bytes(b"no video" * 99)
    readers = {"imageio_ffmpeg": reader, "av": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: readers[name] if name in readers else find(name))
    with pytest.raises(error, match=message):
        metrics.compute_psnr(broken, broken)


def test_video_names_are_the_same_functions():
    for name in ("psnr", "ssim", "mse", "lpips", "fid"):
        assert getattr(metrics, f"compute_video_{name}") is getattr(metrics, f"compute_{name}")


def test_videos_of_different_lengths(tmp_path, caplog):
    true, test = save_video(tmp_path / "a.gif", TRUE), save_video(tmp_path / "b.gif", TEST[:2])
    with caplog.at_level(logging.WARNING, logger="cachedit.metrics"):
        assert metrics.compute_psnr(true, test)[1] == 2
    assert "only the first 2 frames" in caplog.text


def test_what_cannot_be_compared(tmp_path):
    true, other = save(tmp_path / "true", TRUE), save(tmp_path / "other", TEST, ("x.png", "y.png", "z.png"))
    video, empty = save_video(tmp_path / "v.gif", TRUE), tmp_path / "empty"
    empty.mkdir()
    for a, b, error, message in [
        (true, other, ValueError, "has no picture or video with the name of one in"),
        (true, f"{other}/x.png", ValueError, "must both be folders, or neither"),
        (TRUE[0], other, ValueError, "must both be folders, or neither"),
        (TRUE[0], TEST[0][:8], ValueError, r"as large as image_true, \[3, H, W\] = \[3, 24, 32\], got \[3, 8, 32\]"),
        (TRUE[0], TEST[0] / 255, ValueError, r"an array \[H, W, 3\] of integers, got float64 \[24, 32, 3\]"),
        (video, f"{other}/x.png", ValueError, "must both be videos, or neither"),
        (TRUE[0].astype(int) + 99, TEST[0], ValueError, "of integers from 0 to 255, got 99 to 354"),
        (None, TEST[0], TypeError, r"image_true must be a path or an array \[H, W, 3\] of integers, got NoneType"),
        (TRUE[0], [TEST[0]], TypeError, "image_test must be a path or an array .*, got list"),
        (str(empty), true, ValueError, "image_true: there is no picture or video in"),
        ("nowhere", true, FileNotFoundError, "there is no file or folder nowhere"),
    ]:
        with pytest.raises(error, match=message):
            metrics.compute_psnr(a, b)
    with pytest.raises(ValueError, match=r"ssim needs pictures of at least 6 pixels on each side, got \[5, 32\]"):
        metrics.compute_ssim(TRUE[0][:5], TEST[0][:5])
    assert metrics.compute_ssim(TRUE[0][:6], TRUE[0][:6]) == (1, 1)
