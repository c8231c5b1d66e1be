"""What a pipeline has beside its transformers: text encoders, VAEs, ControlNets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from .text_encoder import check_text_encoder
from .vae import SUPPORTED, check_tiles

__all__ = ["Extra", "find_extra"]


class Extra(NamedTuple):
    """A module, and what it is: ``"vae"``, ``"controlnet"`` or ``"text_encoder"``."""

    name: str
    module: nn.Module
    kind: str

    def check(self, group: dist.ProcessGroup) -> None:
        """Raise a ValueError if it can't be shared out over the ranks of ``group``. Changes nothing."""
        if self.kind == "vae":
            check_tiles(self.module, group)
        elif self.kind == "text_encoder":
            check_text_encoder(self.module, dist.get_world_size(group))


def find_extra(pipe: Any, items: Sequence[str | nn.Module]) -> list[Extra]:
    """Find the modules that ``extra_parallel_modules`` means.

    Raises:
        ValueError: For a name that the pipeline does not have.
    """
    found = []
    for item in items:
        module = getattr(pipe, item, None) if isinstance(item, str) else item
        if not isinstance(module, nn.Module):
            names = [name for name, value in getattr(pipe, "components", {}).items() if isinstance(value, nn.Module)]
            raise ValueError(
                f"extra_parallel_modules: {type(pipe).__name__} has no {item!r}; its modules are "
                f"{', '.join(names) or 'none'}"
            )
        found.append(Extra(item if isinstance(item, str) else type(item).__name__, module, _kind(module)))
    return found


def _kind(module: nn.Module) -> str:
    classes = [cls.__name__ for cls in type(module).__mro__]
    if any(name in SUPPORTED or name.startswith("Autoencoder") for name in classes):
        return "vae"
    return "controlnet" if any("ControlNet" in name for name in classes) else "text_encoder"
