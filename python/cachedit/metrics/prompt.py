"""How well pictures fit their prompts: CLIP score (arXiv 2104.08718) and ImageReward (arXiv 2304.05977)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from ..platforms import current_platform
from .sources import PICTURES, Media, existing, media_files, read_picture

__all__ = ["PROMPT_METRICS", "compute_clip_score", "compute_image_reward", "score"]

logger = logging.getLogger(__name__)

CLIP = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
REWARD_FILES = ("ImageReward.pt", "med_config.json")
Score = Callable[[torch.Tensor, str], float]  # of a picture, uint8 [3, H, W], and its prompt


def compute_clip_score(
    img_dir: Media, prompts: str | Sequence[str], clip_model_path: str | None = None
) -> tuple[float, int]:
    """Return the mean CLIP score (100 times the cosine of picture and prompt, at least 0) and the number of pictures.

    Args:
        img_dir: A picture, as a file or array [H, W, 3] of integers from 0 to 255, or a folder of pictures, which are
            taken in natural order.
        prompts: A prompt, a list of them, or a text file with one on each line.
        clip_model_path: A CLIP model's folder or its name in the local Hugging Face cache. Default: the variable
            ``CLIP_MODEL_DIR``, else ``laion/CLIP-ViT-g-14-laion2B-s12B-b42K``.

    Raises:
        ValueError: Without a picture or a prompt; for a folder without a model.
        TypeError: For prompts that are not strings.
        FileNotFoundError: If the model is not on this machine, and the message says where to put it; or the text file.
        ImportError: Without torchmetrics or transformers.
    """
    return _mean(score(lambda: load_clip(clip_model_path), img_dir, prompts))


def compute_image_reward(
    img_dir: Media, prompts: str | Sequence[str], imagereward_model_path: str | None = None
) -> tuple[float, int]:
    """Return the mean ImageReward and the number of pictures.

    Args:
        img_dir: As for :func:`compute_clip_score`.
        prompts: As for :func:`compute_clip_score`.
        imagereward_model_path: Folder with ``ImageReward.pt`` and ``med_config.json``. Default: the variable
            ``IMAGEREWARD_MODEL_DIR``, else ``~/.cache/ImageReward``.

    Raises:
        ValueError, TypeError, FileNotFoundError: As :func:`compute_clip_score`.
        ImportError: Without the package ``image-reward``.
    """
    return _mean(score(lambda: load_image_reward(imagereward_model_path), img_dir, prompts))


def score(
    load: Callable[[], Score],
    img_dir: Media,
    prompts: str | Sequence[str],
    advance: Callable[[int, int], None] = lambda done, files: None,
) -> list[tuple[str, float]]:
    """The name and score of each picture; ``advance`` as in :func:`cachedit.metrics.compare.compare`.

    The model is loaded when pictures and prompts are known to be there.
    """
    pictures, texts = _pictures(img_dir), _prompts(prompts)
    function = load()
    if len(pictures) != len(texts):
        logger.warning("%d pictures and %d prompts: those without a partner are left out", len(pictures), len(texts))
    result = []
    for (name, picture), text in zip(pictures, texts, strict=False):
        result.append((name, function(read_picture(picture), text)))
        advance(len(result), min(len(pictures), len(texts)))
    return result


def load_clip(path: str | None = None) -> Score:
    """The CLIP score as a function."""
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPModel, CLIPProcessor

    path = path or os.environ.get("CLIP_MODEL_DIR") or CLIP
    try:
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
    except OSError as error:
        if Path(path).is_dir():
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"clip_model_path: {path} does not hold a CLIP model as Hugging Face's: {reason}"
            ) from error
        raise FileNotFoundError(
            f"the CLIP score needs the model {path}, which is not on this machine: `hf download {path}` puts it into "
            "Hugging Face's cache, or let CLIP_MODEL_DIR name a folder that holds its config.json, model.safetensors "
            "and tokenizer"
        ) from error
    model = model.eval().to(current_platform.device_type)

    def function(picture: torch.Tensor, prompt: str) -> float:
        with torch.no_grad():
            loaded: Any = _Features(model), processor
            value = clip_score(picture.to(model.device), prompt, lambda: loaded)
        return float(value)

    return function


class _Features:
    """A CLIP model as torchmetrics knows them: transformers 5 returns objects where it expects tensors."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: Any) -> _Features:
        return self

    def get_image_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_text_features(*inputs))


def _tensor(output: Any) -> torch.Tensor:
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def load_image_reward(path: str | None = None) -> Score:
    """ImageReward as a function."""
    folder = Path(path or os.environ.get("IMAGEREWARD_MODEL_DIR") or "~/.cache/ImageReward").expanduser()
    try:
        import ImageReward
    except ImportError as error:
        raise ImportError(f"image_reward needs the package ImageReward: pip install image-reward ({error})") from error
    for file in REWARD_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"image_reward needs the file {file}, which is not on this machine: get it from "
                f"https://huggingface.co/zai-org/ImageReward and put it into {folder} (or another folder that the "
                "variable IMAGEREWARD_MODEL_DIR names)"
            )
    weights, settings = (str(folder / file) for file in REWARD_FILES)
    device = current_platform.device_type
    model = ImageReward.load(weights, device=device, download_root=str(folder), med_config=settings)

    def function(picture: torch.Tensor, prompt: str) -> float:
        from PIL import Image

        return float(model.score(prompt, Image.fromarray(picture.permute(1, 2, 0).numpy())))

    return function


PROMPT_METRICS: dict[str, Callable[[], Score]] = {"clip_score": load_clip, "image_reward": load_image_reward}


def _pictures(img_dir: Media) -> list[tuple[str, Media]]:
    if isinstance(img_dir, numpy.ndarray):
        return [("array", img_dir)]
    existing(img_dir, "img_dir")
    if not Path(img_dir).is_dir():
        return [(Path(img_dir).name, img_dir)]
    files = media_files(img_dir, PICTURES)
    if not files:
        raise ValueError(f"img_dir: there is no picture in {img_dir}")
    return [(str(file.relative_to(img_dir)), file) for file in files]


def _prompts(prompts: str | Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        is_file = len(prompts) < 4096 and Path(prompts).is_file()
        if prompts.endswith(".txt") and not is_file:
            raise FileNotFoundError(f"prompts: there is no file {prompts}")
        prompts = Path(prompts).read_text(encoding="utf-8").splitlines() if is_file else [prompts]
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"prompts must be a string, a list of strings or the path of a text file, got {prompts!r}")
    texts = [text.strip() for text in prompts]
    if not any(texts):
        raise ValueError("prompts: there is no prompt")
    return texts


def _mean(values: list[tuple[str, float]]) -> tuple[float, int]:
    return sum(value for _, value in values) / len(values), len(values)
