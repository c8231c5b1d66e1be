"""Small random-weight pipelines, made offline: the real pipeline, transformer and scheduler classes.

``build("FluxPipeline")`` makes one; ``BUILDERS`` has all names, and ``LOOPS`` those of transformers without a pipeline.
Text encoders are absent, since prompts are given as embeddings; what a pipeline returns are latents. One module per
family.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch
from torch import nn

from pipelines.common import BUILDERS, LOOPS, Tiny, randomise

__all__ = ["BUILDERS", "LOOPS", "Tiny", "build"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")  # enters its builders


def build(name: str) -> Tiny:
    torch.manual_seed(0)
    tiny = (BUILDERS | LOOPS)[name]()
    for component in tiny.pipe.components.values():
        if isinstance(component, nn.Module):
            randomise(component.eval().requires_grad_(False))
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny
