"""Small random-weight pipelines, made offline: the real pipeline, transformer and scheduler classes.

Text encoders are absent, since prompts are given as embeddings; what a pipeline returns are latents.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SQUARE, WIDE = {"height": 32, "width": 32}, {"height": 32, "width": 48}


@dataclasses.dataclass
class Tiny:
    """A pipeline, and how to call it.

    Args:
        pipe: The pipeline.
        inputs: Arguments of every call.
        guided: Further arguments, with which it guides by two branches (or more).
        branches: How many times it then calls its transformer in a step; 1 where branches are one batch, or there
            is no guidance.
        sizes: Arguments for two resolutions.
        steps: Name of the argument that takes the number of steps.
    """

    pipe: Any
    inputs: dict[str, Any]
    guided: dict[str, Any] = dataclasses.field(default_factory=dict)
    branches: int = 1
    sizes: tuple[dict[str, Any], dict[str, Any]] = (SQUARE, WIDE)
    steps: str = "num_inference_steps"

    def __call__(self, steps: int, size: int = 0, guided: bool = True, seed: int = 0, **kwargs: Any) -> Tensor:
        """Latents of one request."""
        inputs = {**self.inputs, **self.sizes[size], **(self.guided if guided else {}), self.steps: steps, **kwargs}
        result = self.pipe(
            **{"generator": torch.Generator().manual_seed(seed), "output_type": "latent", "return_dict": False} | inputs
        )
        return result[0]


BUILDERS: dict[str, Callable[[], Tiny]] = {}


def builds(name: str) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Enter a function that makes a :class:`Tiny` under a pipeline's class name, ``+ variant`` after it if needed."""

    def enter(function: Callable[[], Tiny]) -> Callable[[], Tiny]:
        BUILDERS[name] = function
        return function

    return enter


def randomise(module: nn.Module) -> None:
    """Fill what is left empty, zero or constant for training: a block that does nothing would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        flat = parameter.flatten()
        if not flat.isfinite().all() or (flat == 0).all():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int = 32, width: int = 32, seed: int = 5) -> Tensor:
    """An image with values from 0 to 1, shape (1, 3, height, width)."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def image_vae(channels: int = 4, levels: int = 2, **kwargs: Any) -> nn.Module:
    """An AutoencoderKL that scales by ``2 ** (levels - 1)``."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        latent_channels=channels,
        norm_num_groups=1,
        **kwargs,
    )


def wan_vae(channels: int = 16) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3, z_dim=channels, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def assemble(name: str, **components: Any) -> Any:
    """A diffusers pipeline of the class of that name; components that are not given are None."""
    import diffusers

    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    return cls(**{**dict.fromkeys(required), **components})
