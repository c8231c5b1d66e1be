"""Random pictures, and others that are a little apart from them, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import numpy
from PIL import Image

_RANDOM = numpy.random.default_rng(0)
TRUE = _RANDOM.integers(0, 256, (3, 24, 32, 3), dtype=numpy.uint8)
TEST = numpy.clip(TRUE.astype(int) + _RANDOM.integers(-9, 10, TRUE.shape), 0, 255).astype(numpy.uint8)


def save(folder: Path, pictures: numpy.ndarray, names: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> str:
    """Write PNG files; returns the folder."""
    for name, picture in zip(names, pictures, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name)
    return str(folder)


def save_video(path: Path, frames: numpy.ndarray) -> str:
    """Write a GIF, whose frames keep only some colours: read it again to know them."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=others, duration=100)
    return str(path)
