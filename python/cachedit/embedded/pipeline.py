"""The embedded text-to-image pipeline: a FLUX transformer of 2.5M parameters that draws 32 x 32 pictures from prompts.

It is a real diffusers pipeline: ``FluxTransformer2DModel`` and ``FlowMatchEulerDiscreteScheduler`` as they come, saved
and loaded like any other. The one thing of its own is the text code (:mod:`cachedit.embedded.text`), without weights.
Pictures are made in pixel space, 4 x 4 pixels a token, so there is no decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, ImagePipelineOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .prompt import parse_prompt
from .scene import Scene
from .text import encode_scenes, text_ids

IMAGE_SIZE = 32
PATCH = 4
GRID = IMAGE_SIZE // PATCH
CHANNELS = 3 * PATCH * PATCH


def pack(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, 32, 32] -> [B, 64, 48]: one token per patch, row by row."""
    x = images.view(images.shape[0], 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(images.shape[0], GRID * GRID, CHANNELS)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """[B, 64, 48] -> [B, 3, 32, 32]: the inverse of :func:`pack`."""
    x = tokens.view(tokens.shape[0], GRID, GRID, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(tokens.shape[0], 3, IMAGE_SIZE, IMAGE_SIZE)


def image_ids() -> torch.Tensor:
    """Position ids of the image tokens, float32 [64, 3]: 0, row, column."""
    ids = torch.zeros(GRID, GRID, 3)
    ids[..., 1] = torch.arange(GRID)[:, None]
    ids[..., 2] = torch.arange(GRID)[None, :]
    return ids.view(-1, 3)


class EmbeddedPipeline(DiffusionPipeline):
    """Draws what a prompt of the small grammar in :mod:`cachedit.embedded.prompt` says.

    Args:
        transformer: a ``FluxTransformer2DModel`` with 48 input channels, without guidance embedding.
        scheduler: a ``FlowMatchEulerDiscreteScheduler``.
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Steps of the running or the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` from a callback to skip the remaining steps."""
        return self._interrupt

    def encode_prompt(
        self, prompt: str | Sequence[str], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, 4, 48] and pooled vectors [B, 96] of one prompt or several; PromptError for what is no prompt."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return self.encode_scenes([parse_prompt(text) for text in prompts], device, dtype)

    def encode_scenes(
        self, scenes: Sequence[Scene], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`encode_prompt`, of scenes."""
        tokens, pooled = encode_scenes(scenes)
        return tokens.to(device, dtype), pooled.to(device, dtype)

    def prepare_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise [B, 3, 32, 32], or ``latents`` checked for that shape. Noise is drawn in float32 whatever ``dtype`` is,
        so that one seed means one picture in every precision."""
        shape = (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
            return latents.to(device=device, dtype=dtype)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}; give one, or one per picture")
        noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return noise.to(dtype)

    def check_inputs(
        self,
        prompt: str | Sequence[str],
        height: int,
        width: int,
        num_inference_steps: int,
        output_type: str,
        output_size: int | None,
        callback_inputs: Sequence[str],
    ) -> None:
        """Raises ValueError or TypeError for what ``__call__`` cannot use."""
        if not isinstance(prompt, str):
            if not isinstance(prompt, (list, tuple)) or not all(isinstance(text, str) for text in prompt):
                raise TypeError(f"prompt must be a string or a list of strings, got {type(prompt).__name__}")
            if not prompt:
                raise ValueError("prompt is an empty list")
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the model draws {IMAGE_SIZE} x {IMAGE_SIZE} pictures, height={height} and width={width} are not "
                "possible; output_size enlarges the finished picture"
            )
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be a positive integer, got {num_inference_steps!r}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", got {output_type!r}')
        if output_size is not None and (output_type != "pil" or not isinstance(output_size, int) or output_size < 1):
            raise ValueError(f'output_size must be a positive integer and needs output_type="pil", got {output_size!r}')
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback tensors must be among {self._callback_tensor_inputs}, got {unknown}")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 28,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        height: int = IMAGE_SIZE,
        width: int = IMAGE_SIZE,
        output_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one picture per prompt.

        Args:
            prompt: a sentence such as "a red circle left of a blue square", or a list of them.
            num_inference_steps: denoising steps.
            generator: source of the noise; one, or one per prompt.
            latents: the noise itself, [B, 3, 32, 32], instead of drawing it.
            output_type: "pil", "np" (float32 [B, 32, 32, 3] in 0 to 1), "pt" (float32 [B, 3, 32, 32] in 0 to 1) or
                "latent" (the last step's tensor, about -1 to 1).
            return_dict: an ``ImagePipelineOutput``; otherwise a tuple with the images.
            callback_on_step_end: called as in every diffusers pipeline, with (pipeline, step, timestep, tensors).
            callback_on_step_end_tensor_inputs: which tensors it gets; only "latents".
            height, width: 32; other values are an error.
            output_size: side in pixels to which PIL pictures are enlarged (bicubic), None for the true 32.

        Raises:
            PromptError: a prompt that the grammar does not cover; it names the word and what would fit.
            ValueError, TypeError: any other argument that cannot be used.
        """
        self.check_inputs(
            prompt, height, width, num_inference_steps, output_type, output_size, callback_on_step_end_tensor_inputs
        )
        device, dtype = self._execution_device, self.transformer.dtype
        tokens, pooled = self.encode_prompt(prompt, device, dtype)
        latents = self.prepare_latents(tokens.shape[0], dtype, device, generator, latents)
        img_ids, txt_ids = image_ids().to(device, dtype), text_ids().to(device, dtype)

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        timesteps = self.scheduler.timesteps
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(timesteps)
        self._interrupt = False

        hidden = pack(latents)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for index, t in enumerate(timesteps):
                if self._interrupt:
                    continue
                timestep = t.expand(hidden.shape[0]).to(dtype)
                with self.transformer.cache_context("cond"):
                    velocity = self.transformer(
                        hidden_states=hidden,
                        timestep=timestep / 1000,
                        guidance=None,
                        pooled_projections=pooled,
                        encoder_hidden_states=tokens,
                        txt_ids=txt_ids,
                        img_ids=img_ids,
                        return_dict=False,
                    )[0]
                hidden = self.scheduler.step(velocity, t, hidden, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = {"latents": unpack(hidden)} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, index, t, given) or {}
                    if changed.get("latents") is not None and changed["latents"] is not given.get("latents"):
                        hidden = pack(changed["latents"].to(device, dtype))
                progress_bar.update()

        images = self.postprocess(unpack(hidden), output_type, output_size)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def postprocess(latents: torch.Tensor, output_type: str, output_size: int | None = None) -> Any:
        """Latents [B, 3, 32, 32] -> what ``output_type`` asks for."""
        if output_type == "latent":
            return latents
        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        pictures = [Image.fromarray((item * 255).round().astype(np.uint8)) for item in array]
        if output_size is not None:
            pictures = [item.resize((output_size, output_size), Image.Resampling.BICUBIC) for item in pictures]
        return pictures
