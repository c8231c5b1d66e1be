"""What the builders of small pipelines share.

Text encoders are absent, since prompts are given as embeddings; what a pipeline returns are latents.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

SQUARE, WIDE = {"height": 32, "width": 32}, {"height": 32, "width": 48}
SMALL_SQUARE, SMALL_WIDE = {"height": 16, "width": 16}, {"height": 16, "width": 32}
SMALL, WIDE_VIDEO = {**SMALL_SQUARE, "num_frames": 9}, {**SMALL_WIDE, "num_frames": 5}


@dataclasses.dataclass
class Tiny:
    """A pipeline, and how to call it.

    Args:
        pipe: The pipeline.
        inputs: Arguments of every call; those that are functions are called with the resolution.
        guided: Further arguments, with which it guides by two branches (or more).
        branches: How many times it then calls its transformer in a step; 1 where branches are one batch, or there
            is no guidance.
        sizes: Arguments for two resolutions.
        steps: Arguments for so many steps.
        forwards: Calls of the transformer, per branch, for so many steps.
        patches: Names to patch during calls, for unittest.mock.patch: sizes that pipelines do not let one set.
    """

    pipe: Any
    inputs: dict[str, Any]
    guided: dict[str, Any] = dataclasses.field(default_factory=dict)
    branches: int = 1
    sizes: tuple[dict[str, Any], dict[str, Any]] = (SQUARE, WIDE)
    steps: Callable[[int], dict[str, Any]] = lambda steps: {"num_inference_steps": steps}
    patches: dict[str, Any] = dataclasses.field(default_factory=dict)
    forwards: Callable[[int], int] = lambda steps: steps

    def __call__(self, steps: int, size: int = 0, guided: bool = True, seed: int = 0, **kwargs: Any) -> Tensor:
        """Latents of one request."""
        size_arguments = self.sizes[size]
        inputs = {**self.inputs, **(self.guided if guided else {})}
        inputs = {name: value(**size_arguments) if callable(value) else value for name, value in inputs.items()}
        inputs |= {"generator": torch.Generator().manual_seed(seed), **self.steps(steps), **size_arguments, **kwargs}
        torch.manual_seed(seed)  # some draw from the global generator
        with ExitStack() as stack:
            for name, value in self.patches.items():
                stack.enter_context(mock.patch(name, value, create=True))
            result = self.pipe(**{"output_type": "latent", "return_dict": False} | inputs)[0]
        return (torch.stack(result) if isinstance(result, list) else torch.as_tensor(result)).float()


BUILDERS: dict[str, Callable[[], Tiny]] = {}
LOOPS: dict[str, Callable[[], Tiny]] = {}  # of transformers that no pipeline class runs


def builds(
    name: str, builders: dict[str, Callable[[], Tiny]] = BUILDERS
) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Enter a function that makes a :class:`Tiny` under a pipeline's class name, ``+ variant`` after it if needed."""

    def enter(function: Callable[[], Tiny]) -> Callable[[], Tiny]:
        builders[name] = function
        return function

    return enter


def randomise(module: nn.Module) -> None:
    """Fill what is left empty, zero or constant for training: a block that does nothing would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        flat = parameter.flatten()
        if not flat.isfinite().all() or (flat == 0).all():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


class Encoder(nn.Module):
    """In place of a text encoder, or a processor, that a pipeline only asks for these."""

    dtype, device, image_processor = torch.float32, torch.device("cpu"), None


class SafetyChecker(Encoder):
    """Cosmos refuses to run without one."""

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def photo(height: int, width: int, **_: Any) -> Any:
    """A PIL image."""
    from PIL import Image

    pixels = picture(height, width)[0].permute(1, 2, 0) * 255
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def clip(height: int, width: int, num_frames: int, mode: str = "RGB", **_: Any) -> list[Any]:
    """PIL images that make a video."""
    return [photo(height, width).convert(mode) for _ in range(num_frames)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int, width: int, seed: int = 5, **_: Any) -> Tensor:
    """An image with values from 0 to 1, shape (1, 3, height, width)."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def control(height: int, width: int, **_: Any) -> Tensor:
    """Another one."""
    return picture(height, width, seed=6)


def left_half(height: int, width: int, **_: Any) -> Tensor:
    """A mask, shape (1, 1, height, width)."""
    return torch.zeros(1, 1, height, width).index_fill(3, torch.arange(width // 2), 1.0)


def flow(**kwargs: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**kwargs)


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


def assemble(pipeline: Any, **components: Any) -> Any:
    """A diffusers pipeline of this class, or the class of that name; components that are not given are None."""
    import diffusers

    cls = getattr(diffusers, pipeline) if isinstance(pipeline, str) else pipeline
    parameters = inspect.signature(cls.__init__).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    return cls(**{**dict.fromkeys(required), **components})


def guided(
    name: Any,
    dim: int,
    components: dict[str, Any],
    branches: int = 1,
    mask: str = "",
    pooled: tuple[str, int] | None = None,
    scale: str = "guidance_scale",
    sizes: tuple[dict[str, Any], dict[str, Any]] = (SQUARE, WIDE),
    **inputs: Any,
) -> Tiny:
    """A pipeline that takes prompt_embeds of width ``dim`` and negative_prompt_embeds.

    Args:
        name: Class of the pipeline, or its name.
        dim: Width of the embeddings.
        components: Of the pipeline.
        branches: 2 where each branch is a call of its own.
        mask: Name of the argument for a mask of the embeddings, if there is one.
        pooled: Name and width of the argument for a pooled embedding, if there is one.
        scale: Name of the guidance scale.
        sizes: Arguments for two resolutions.
        **inputs: Further arguments.
    """

    def embeddings(prefix: str, seed: int) -> dict[str, Tensor]:
        given = {f"{prefix}prompt_embeds": normal(1, 5, dim, seed=seed)}
        if mask:
            given[prefix + mask] = torch.ones(1, 5, dtype=torch.long)
        if pooled:
            given[prefix + pooled[0]] = normal(1, pooled[1], seed=seed + 10)
        return given

    return Tiny(
        assemble(name, **components),
        {**embeddings("", 0), scale: 1.0, **inputs},
        {**embeddings("negative_", 1), scale: 4.0},
        branches,
        sizes,
    )


def video(name: Any, dim: int, components: dict[str, Any], branches: int = 1, **kwargs: Any) -> Tiny:
    """The same for videos."""
    return guided(name, dim, components, branches, **{"sizes": (SMALL, WIDE_VIDEO), **kwargs})
