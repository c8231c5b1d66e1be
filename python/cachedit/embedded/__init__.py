"""A small text-to-image diffusion transformer, trained from scratch and shipped with the package.

``load_pipeline()`` gives a diffusers pipeline that draws 32 x 32 pictures of coloured shapes from prompts such as
"a red circle left of a blue square" or "two small green triangles above a large yellow ring"; the whole grammar is in
:mod:`cachedit.embedded.prompt`. It needs no network, no GPU and a second to load, and it is a real FLUX transformer (4
double-stream and 8 single-stream blocks, 2.5M parameters), so caching can be tried and measured on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .draw import draw_scenes
from .pipeline import EmbeddedPipeline
from .prompt import PromptError, describe, parse_prompt
from .scene import Scene, SceneObject, is_held_out, sample_scene

_LAZY = ("CheckResult", "check_pipeline", "judge")  # lazily, so that `python -m cachedit.embedded.check` loads once
WEIGHTS = Path(__file__).parent / "weights"

__all__ = [
    "WEIGHTS",
    "CheckResult",
    "EmbeddedPipeline",
    "PromptError",
    "Scene",
    "SceneObject",
    "check_pipeline",
    "describe",
    "draw_scenes",
    "is_held_out",
    "judge",
    "load_pipeline",
    "parse_prompt",
    "sample_scene",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from . import check

        return getattr(check, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_pipeline(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, path: str | Path | None = None
) -> EmbeddedPipeline:
    """The shipped pipeline, or one saved at ``path``, on ``device`` in ``dtype``; reads local files only.

    Raises FileNotFoundError where there are no weights.
    """
    folder = Path(path) if path is not None else WEIGHTS
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"no pipeline at {folder}: model_index.json is missing")
    pipeline: Any = EmbeddedPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipeline.to(device)
    return pipeline  # type: ignore[no-any-return]
