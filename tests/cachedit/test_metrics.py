import math

import numpy
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cachedit import metrics

RANDOM = numpy.random.default_rng(0)
TRUE = RANDOM.integers(0, 256, (3, 24, 32, 3), dtype=numpy.uint8)
TEST = numpy.clip(TRUE.astype(int) + RANDOM.integers(-9, 10, TRUE.shape), 0, 255).astype(numpy.uint8)


def save(folder, pictures, names=("a.png", "b.png", "c.png")):
    folder.mkdir()
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(folder / name)
    return str(folder)


def test_arrays():
    value, count = metrics.compute_psnr(TRUE[0], TEST[0])
    assert count == 1 and value == pytest.approx(peak_signal_noise_ratio(TRUE[0], TEST[0]), abs=1e-3)
    value, count = metrics.compute_ssim(TRUE[0], TEST[0])
    gaussian = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5}
    expected = structural_similarity(TRUE[0], TEST[0], channel_axis=2, data_range=255, **gaussian)
    assert count == 1 and value == pytest.approx(expected, abs=1e-3)
    assert metrics.compute_psnr(TRUE[0], TRUE[0]) == (math.inf, 1)


@pytest.mark.parametrize("metric", [metrics.compute_psnr, metrics.compute_ssim])
def test_files_and_folders(tmp_path, metric):
    true, test = save(tmp_path / "true", TRUE), save(tmp_path / "test", TEST)
    single = [metric(a, b)[0] for a, b in zip(TRUE, TEST)]
    assert metric(f"{true}/b.png", f"{test}/b.png") == (pytest.approx(single[1]), 1)
    assert metric(true, test) == (pytest.approx(sum(single) / 3), 3)
    fewer = save(tmp_path / "fewer", TEST[:2], ("c.png", "d.png"))
    assert metric(true, fewer) == (pytest.approx(metric(TRUE[2], TEST[0])[0]), 1)


def test_what_cannot_be_compared(tmp_path):
    true, other = save(tmp_path / "true", TRUE), save(tmp_path / "other", TEST, ("x.png", "y.png", "z.png"))
    for a, b, message in [
        (true, other, "has no picture with the name of one in"),
        (true, f"{other}/x.png", "must both be folders, or neither"),
        (TRUE[0], other, "must both be folders, or neither"),
        (TRUE[0], TEST[0][:8], r"image_test must be as large as image_true \(1, 3, 24, 32\), got \(1, 3, 8, 32\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            metrics.compute_psnr(a, b)


def test_names_that_are_to_come():
    with pytest.raises(ImportError, match=r"cachedit.metrics.compute_fid is not available in this version yet"):
        metrics.compute_fid  # noqa: B018
    assert not hasattr(metrics, "compute_anything")
