"""All small pipelines, by name: ``build("FluxPipeline")``."""

from __future__ import annotations

import torch
from torch import nn

import pipelines_image
import pipelines_video
from pipelines_common import BUILDERS, Tiny, randomise

__all__ = ["BUILDERS", "Tiny", "build"]

assert pipelines_image and pipelines_video  # importing them fills BUILDERS


def build(name: str) -> Tiny:
    torch.manual_seed(0)
    tiny = BUILDERS[name]()
    for component in tiny.pipe.components.values():
        if isinstance(component, nn.Module):
            randomise(component.eval().requires_grad_(False))
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny
