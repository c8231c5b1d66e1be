"""Transformers that diffusers runs in modular pipelines only, in a loop of their own.

They are entered under their own names, in ``LOOPS``: no row of the pipeline table belongs to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from pipelines.common import LOOPS, Tiny, builds, flow, normal

TEXT_TOKENS = 5


class Loop(diffusers.DiffusionPipeline):
    """Denoises latents of shape (1, tokens, channels) with one call per step; returns them."""

    def __init__(self, transformer: Any, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int,
        generator: torch.Generator,
        tokens: int,
        channels: int,
        arguments: Callable[[Tensor, Tensor], dict[str, Any]],
        **_: Any,
    ) -> tuple[Tensor]:
        latents = torch.randn(1, tokens, channels, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            velocity = self.transformer(**arguments(latents, t.reshape(1) / 1000), return_dict=False)
            velocity = torch.cat([part.flatten(1) for part in velocity], dim=1).reshape(latents.shape)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return (latents,)


def loop(transformer: Any, channels: int, arguments: Callable[[Tensor, Tensor], dict[str, Any]]) -> Tiny:
    """``arguments`` makes those of a call from latents and a time from 0 to 1."""
    inputs = {"channels": channels, "arguments": lambda **_: arguments}
    return Tiny(Loop(transformer, flow()), inputs, sizes=({"tokens": 16}, {"tokens": 24}))


@builds("Flux3Transformer2DModel", LOOPS)
def _() -> Tiny:
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )

    def arguments(latents: Tensor, time: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": normal(1, TEXT_TOKENS, 16),
            "timestep": time,
            "img_ids": positions(latents.shape[1], 4),
            "txt_ids": positions(TEXT_TOKENS, 4),
            "image_cond_hidden_states": normal(1, 8, 4, seed=1),
            "image_cond_ids": positions(8, 4),
        }

    return loop(transformer, 4, arguments)


@builds("MiniMaxH3Transformer3DModel", LOOPS)
def _() -> Tiny:
    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=2,
        audio_in_channels=8,
        patch_size=(1, 2, 2),
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=32,
        rope_freq_dim=2,
    )

    def arguments(latents: Tensor, time: Tensor) -> dict[str, Any]:
        """Text, then the video's tokens, then as many of audio."""
        half = latents.shape[1] // 2
        kinds = torch.tensor([1] * TEXT_TOKENS + [0] * half + [2] * half)
        return {
            "hidden_states": latents[:, :half],
            "audio_hidden_states": latents[:, half:],
            "encoder_hidden_states": normal(1, TEXT_TOKENS, 16),
            "timestep": torch.cat([time, torch.zeros(1)]),
            "timestep_indices": (kinds == 1).long(),
            "token_tags": kinds,
            "position_ids": positions(len(kinds), 3),
            "text_indices": (kinds == 1).nonzero().flatten(),
            "video_indices": (kinds == 0).nonzero().flatten(),
            "audio_indices": (kinds == 2).nonzero().flatten(),
        }

    return loop(transformer, 8, arguments)


@builds("MiniMaxMusic3Transformer1DModel", LOOPS)
def _() -> Tiny:
    transformer = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=4,
        condition_dim=16,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=16,
    )

    def arguments(latents: Tensor, time: Tensor) -> dict[str, Any]:
        tokens = latents.shape[1]
        condition = normal(1, tokens, 16)
        return {
            "hidden_states": latents.reshape(1, 4, tokens),
            "timestep": 1 - time,
            "encoder_hidden_states": condition,
        }

    return loop(transformer, 4, arguments)


def positions(count: int, axes: int) -> Tensor:
    return torch.arange(count).unsqueeze(1).expand(count, axes).float()
