"""How close pictures and videos are to those of a baseline, and to their prompts.

Names and arguments as in ``cache_dit.metrics``; every function returns ``(value, count)``. PSNR, SSIM and MSE need
nothing but torchmetrics; the others need weights, which are looked for on this machine and never downloaded
(docs/cli.md). The command is ``cachedit metrics``.
"""

from __future__ import annotations

from collections.abc import Sequence

from .compare import compare
from .fid import FrechetInceptionDistance
from .prompt import compute_clip_score, compute_image_reward
from .sources import Media

__all__ = [
    "FrechetInceptionDistance",
    "compute_clip_score",
    "compute_fid",
    "compute_image_reward",
    "compute_lpips",
    "compute_mse",
    "compute_psnr",
    "compute_ssim",
    "compute_video_fid",
    "compute_video_lpips",
    "compute_video_mse",
    "compute_video_psnr",
    "compute_video_ssim",
    "entrypoint",
    "main",
]


def compute_psnr(image_true: Media, image_test: Media) -> tuple[float, int]:
    """Return the mean peak signal-to-noise ratio in dB, and the number of pairs of pictures or frames.

    Equal pairs, whose ratio is infinite, are left out of the mean; it is infinite where all are equal.

    Args:
        image_true: The baseline: a picture or video file, a folder of them (with its subfolders), or an array
            [H, W, 3] of integers from 0 to 255.
        image_test: What to compare with it, in the same form; in folders, files of one name go together.

    Raises:
        ValueError: If folders share no file, two pictures have different sizes, or SSIM gets less than 6 pixels a side.
        TypeError: For what is neither a path nor an array.
        ImportError: Without torchmetrics, for pictures without Pillow, for videos without a reader.
    """
    return _mean("psnr", image_true, image_test)


def compute_ssim(image_true: Media, image_test: Media) -> tuple[float, int]:
    """Return the mean structural similarity (Gaussian window of 11 pixels), and the number of pairs.

    Arguments and errors are those of :func:`compute_psnr`.
    """
    return _mean("ssim", image_true, image_test)


def compute_mse(image_true: Media, image_test: Media) -> tuple[float, int]:
    """Return the mean squared error of values from 0 to 255, and the number of pairs.

    Arguments and errors are those of :func:`compute_psnr`.
    """
    return _mean("mse", image_true, image_test)


def compute_lpips(image_true: Media, image_test: Media) -> tuple[float, int]:
    """Return the mean perceptual distance (LPIPS on AlexNet, arXiv 1801.03924), and the number of pairs.

    Arguments and errors are those of :func:`compute_psnr`; FileNotFoundError where AlexNet's weights are not here.
    """
    return _mean("lpips", image_true, image_test)


def compute_fid(image_true: Media, image_test: Media, batch_size: int = 1) -> tuple[float, int]:
    """Return the Frechet distance between all pictures of both sides (FID, arXiv 1706.08500), and their number.

    Arguments and errors are those of :func:`compute_psnr`; FileNotFoundError where Inception's weights are not here,
    ValueError for fewer than two pairs, which have no covariance.
    """
    comparison = compare(["fid"], image_true, image_test, fid_batch_size=batch_size)
    return comparison.values["fid"], comparison.count


compute_video_psnr = compute_psnr
compute_video_ssim = compute_ssim
compute_video_mse = compute_mse
compute_video_lpips = compute_lpips
compute_video_fid = compute_fid


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``cache-dit-metrics-cli``, which is ``cachedit metrics``."""
    import sys

    try:
        from ..cli.metrics import run
    except ModuleNotFoundError as error:
        sys.exit(f"this needs the package {error.name!r}: pip install 'cachedit-kernels[metrics]'")
    sys.exit(run(arguments))


entrypoint = main


def _mean(metric: str, true: Media, test: Media) -> tuple[float, int]:
    comparison = compare([metric], true, test)
    return comparison.values[metric], comparison.count
