"""What a pipeline has drawn: as arrays to compare, and as files."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

Picture = numpy.ndarray[Any, Any]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
VIDEO_SUFFIXES = {".mp4", ".gif"}


@dataclass(frozen=True)
class Drawn:
    """Pictures [H, W, 3], uint8: a list per picture or video, which has one entry per frame."""

    videos: bool
    items: list[list[Picture]]


def drawn(output: Any) -> Drawn:
    """Take what diffusers' pipelines return.

    Raises:
        ValueError: If it holds neither images nor frames.
    """
    if getattr(output, "images", None) is not None:
        return Drawn(False, [[_picture(image)] for image in output.images])
    if getattr(output, "frames", None) is not None:
        return Drawn(True, [[_picture(frame) for frame in video] for video in output.frames])
    raise ValueError(f"{type(output).__name__} holds neither images nor frames; only these can be written")


def write(result: Drawn, folder: Path, name: str, fps: int) -> list[Path]:
    """Write each picture or video; several are numbered.

    Args:
        result: What to write.
        folder: Made if it is missing.
        name: File name; without a suffix, ``.png`` or ``.mp4`` is added.
        fps: Frames per second of videos.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if file.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        file = file.with_name(file.name + (".mp4" if result.videos else ".png"))
    paths = []
    for number, frames in enumerate(result.items):
        path = file if len(result.items) == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        _write(frames, path, fps, result.videos)
        paths.append(path)
    return paths


def check_name(name: str, videos: bool) -> None:
    """Refuse, before anything is drawn, a file name that cannot be written in the end.

    Raises:
        ValueError: For a suffix of the other kind, or a name with a folder in it.
        ImportError: For MP4 without imageio-ffmpeg.
    """
    suffix = Path(name).suffix.lower()
    if Path(name).name != name:
        raise ValueError(f"--output-file-name must be a name without a folder, got {name}: --output-path is the folder")
    if suffix in (IMAGE_SUFFIXES if videos else VIDEO_SUFFIXES):
        raise ValueError(
            f"--output-file-name: {name} does not fit; this pipeline draws {'videos' if videos else 'images'}"
        )
    if videos and suffix != ".gif" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ImportError(
            "MP4 needs imageio-ffmpeg: pip install 'cachedit-kernels[video]'; or use --output-file-name with .gif"
        )


def name_of(prompt: str) -> str:
    """A file name without suffix from the first words of a prompt."""
    return "_".join(re.findall(r"\w+", prompt.lower()))[:60].strip("_") or "output"


def _picture(picture: Any) -> Picture:
    if isinstance(picture, Image.Image):
        return numpy.asarray(picture.convert("RGB"))
    array = numpy.asarray(picture.cpu() if hasattr(picture, "cpu") else picture)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    return array if array.dtype == numpy.uint8 else (array.clip(0, 1) * 255).round().astype(numpy.uint8)


def _write(frames: Sequence[Picture], path: Path, fps: int, video: bool) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    if not video:
        images[0].save(path)
    elif path.suffix.lower() == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
    else:
        from diffusers.utils.export_utils import export_to_video

        # The codec wants even sizes; imageio's own choice are multiples of 16, to which it would scale the frames.
        export_to_video(images, str(path), fps=fps, macro_block_size=2)
