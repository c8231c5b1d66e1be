"""What is compared with what: pictures and the frames of videos, read in pairs."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

__all__ = ["Media", "Pair", "existing", "matched_files", "media_files", "read_pairs", "read_picture"]

logger = logging.getLogger(__name__)

Media = str | Path | numpy.ndarray[Any, Any]

PICTURES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm"}


class Pair(NamedTuple):
    """Two pictures of one size, uint8 [3, H, W]."""

    name: str
    true: torch.Tensor
    test: torch.Tensor


def matched_files(true: Media, test: Media) -> list[tuple[str, Media, Media]]:
    """Return (name, baseline, other) for each two files to compare, in natural order.

    Raises:
        ValueError: If one is a folder and the other is not, or they share no file.
        FileNotFoundError: For a path that does not exist.
        TypeError: For what is neither a path nor an array.
    """
    sides = {"image_true": true, "image_test": test}
    folders = [not isinstance(media, numpy.ndarray) and existing(media, side).is_dir() for side, media in sides.items()]
    if not any(folders):
        return [("array" if isinstance(test, numpy.ndarray) else Path(test).name, true, test)]
    if not all(folders) or isinstance(true, numpy.ndarray) or isinstance(test, numpy.ndarray):
        raise ValueError("image_true and image_test must both be folders, or neither")
    names = [file.relative_to(true) for file in media_files(true)]
    if not names:
        raise ValueError(f"image_true: there is no picture or video in {true}")
    found = [name for name in names if (Path(test) / name).is_file()]
    if not found:
        raise ValueError(f"image_test: {test} has no picture or video with the name of one in {true}")
    if len(found) < len(names):
        logger.warning("%s lacks %d of the %d files in %s", test, len(names) - len(found), len(names), true)
    return [(str(name), Path(true) / name, Path(test) / name) for name in found]


def media_files(folder: str | Path, suffixes: set[str] = PICTURES | VIDEOS) -> list[Path]:
    """Pictures and videos below a folder, in natural order: ``2.png`` comes before ``10.png``."""
    files = (path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes)
    return sorted(files, key=lambda path: [(not part.isdigit(), int(part) if part.isdigit() else part)
                                           for part in re.split(r"(\d+)", str(path))])  # fmt: skip


def read_pairs(name: str, true: Media, test: Media) -> Iterator[Pair]:
    """Read two files: one pair of pictures, or a pair per frame of two videos, as far as the shorter one goes.

    Raises:
        ValueError: If the sizes differ, one is a video and the other is not, or a video cannot be read.
        ImportError: For a video without a package that reads it.
    """
    if not _is_video(true) and not _is_video(test):
        yield _pair(name, read_picture(true), read_picture(test))
        return
    if not (_is_video(true) and _is_video(test)):
        raise ValueError(f"{name}: image_true and image_test must both be videos, or neither")
    for number, (a, b) in enumerate(zip_longest(_frames(true), _frames(test))):
        if a is None or b is None:
            logger.warning("%s: the videos differ in length; only the first %d frames are compared", name, number)
            return
        yield _pair(f"{name}, frame {number}", a, b)


def read_picture(picture: Media) -> torch.Tensor:
    """A picture as uint8 [3, H, W]."""
    if not isinstance(picture, numpy.ndarray):
        from PIL import Image

        with Image.open(picture) as opened:
            picture = numpy.asarray(opened.convert("RGB"))
    if picture.ndim != 3 or picture.shape[2] != 3 or not numpy.issubdtype(picture.dtype, numpy.integer):
        raise ValueError(f"a picture must be an array [H, W, 3] of integers, got {picture.dtype} {list(picture.shape)}")
    if picture.dtype != numpy.uint8 and picture.size and not 0 <= picture.min() <= picture.max() <= 255:
        raise ValueError(f"a picture must be of integers from 0 to 255, got {picture.min()} to {picture.max()}")
    return torch.from_numpy(picture.astype(numpy.uint8)).permute(2, 0, 1).contiguous()


def _frames(video: Any) -> Iterator[torch.Tensor]:
    """Frames as uint8 [3, H, W], by imageio and one of the packages that it reads videos with."""
    try:
        import imageio.v3

        frames = imageio.v3.imiter(video)
        first = next(frames, None)
    except FileNotFoundError:
        raise
    except (ImportError, OSError, ValueError) as error:
        if not any(importlib.util.find_spec(package) for package in ("imageio_ffmpeg", "av")):
            raise ImportError(
                f"{video} could not be opened; reading videos needs imageio with imageio-ffmpeg or av: "
                "pip install 'cachedit-kernels[video]'"
            ) from error
        raise ValueError(f"{video} cannot be read as a video: {str(error).strip().splitlines()[0]}") from error
    if first is None:
        raise ValueError(f"{video} has no frames")
    yield read_picture(first[..., :3])
    for frame in frames:
        yield read_picture(frame[..., :3])


def _pair(name: str, true: torch.Tensor, test: torch.Tensor) -> Pair:
    if true.shape != test.shape:
        raise ValueError(f"{name}: image_test must be as large as image_true, [3, H, W] = {list(true.shape)}, "
                         f"got {list(test.shape)}")  # fmt: skip
    return Pair(name, true, test)


def existing(path: Any, argument: str) -> Path:
    """The path of a file or folder. FileNotFoundError where there is none, TypeError for what is no path."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{argument} must be a path or an array [H, W, 3] of integers, got {type(path).__name__}")
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return Path(path)


def _is_video(media: Media) -> bool:
    return not isinstance(media, numpy.ndarray) and Path(media).suffix.lower() in VIDEOS
