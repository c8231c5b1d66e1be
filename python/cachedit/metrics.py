"""How close pictures are to those of a baseline: names and arguments as in ``cache_dit.metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

__all__ = ["compute_psnr", "compute_ssim"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_LATER = (
    *("compute_mse", "compute_fid", "compute_video_psnr", "compute_video_ssim", "compute_video_mse"),
    *("compute_video_fid", "FrechetInceptionDistance", "entrypoint", "main"),
)

Pictures = str | Path | numpy.ndarray[Any, Any]


def compute_psnr(image_true: Pictures, image_test: Pictures) -> tuple[float, int]:
    """Return the mean peak signal-to-noise ratio in dB (infinite for equal pictures), and the number of pictures.

    Args:
        image_true: The baseline: a picture file, a folder of them, or an array [H, W, 3] of integers from 0 to 255.
        image_test: What to compare with it, in the same form; in folders, pictures of one name go together.

    Raises:
        ValueError: If folders share no picture, or two pictures have different sizes.
        ImportError: Without torchmetrics, or for files without Pillow.
    """
    return _mean("psnr_db", image_true, image_test)


def compute_ssim(image_true: Pictures, image_test: Pictures) -> tuple[float, int]:
    """Return the mean structural similarity (Gaussian window of 11 pixels) and the number of pictures.

    Arguments and errors are those of :func:`compute_psnr`.
    """
    return _mean("ssim", image_true, image_test)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        raise ImportError(f"cachedit.metrics.{name} is not available in this version yet")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _mean(quality: str, image_true: Pictures, image_test: Pictures) -> tuple[float, int]:
    from .cli.quality import compare

    values = []
    for true, test in _pairs(image_true, image_test):
        if true.shape != test.shape:
            raise ValueError(f"image_test must be as large as image_true {tuple(true.shape)}, got {tuple(test.shape)}")
        values.append(getattr(compare(test, true), quality))
    return sum(values) / len(values), len(values)


def _pairs(image_true: Pictures, image_test: Pictures) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    folders = [not isinstance(image, numpy.ndarray) and Path(image).is_dir() for image in (image_true, image_test)]
    if not any(folders):
        yield _read(image_true), _read(image_test)
        return
    if not all(folders) or isinstance(image_true, numpy.ndarray) or isinstance(image_test, numpy.ndarray):
        raise ValueError("image_true and image_test must both be folders, or neither")
    files = sorted(path for path in Path(image_true).iterdir() if path.suffix.lower() in _SUFFIXES)
    found = [(path, Path(image_test) / path.name) for path in files if (Path(image_test) / path.name).is_file()]
    if not found:
        raise ValueError(f"image_test: {image_test} has no picture with the name of one in {image_true}")
    for true, test in found:
        yield _read(true), _read(test)


def _read(image: Pictures) -> torch.Tensor:
    """A picture as [1, 3, H, W] in 0 to 1."""
    if not isinstance(image, numpy.ndarray):
        from PIL import Image

        with Image.open(image) as opened:
            image = numpy.asarray(opened.convert("RGB"))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
