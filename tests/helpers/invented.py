"""A transformer and a pipeline of the kind that somebody brings along: diffusers has neither."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

CHANNELS = 4


class InventedBlock(nn.Module):
    """Cross attention and a gated change."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.gate = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Tensor:
        change, _ = self.attention(self.norm(hidden_states), encoder_hidden_states, encoder_hidden_states)
        return hidden_states + torch.tanh(self.gate(temb)).unsqueeze(1) * change


class InventedTransformer(ModelMixin, ConfigMixin):
    """Latents of shape (batch, 4, height, width) become one token per pixel."""

    @register_to_config
    def __init__(self, dim: int = 16, num_layers: int = 24):
        super().__init__()
        self.embed, self.time = nn.Linear(CHANNELS, dim), nn.Linear(1, dim)
        self.blocks = nn.ModuleList(InventedBlock(dim) for _ in range(num_layers))
        self.out = nn.Linear(dim, CHANNELS)

    def forward(self, latents: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = self.embed(latents.flatten(2).transpose(1, 2))
        temb = self.time(timestep.reshape(-1, 1) / 1000)
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return self.out(hidden_states).transpose(1, 2).reshape(latents.shape)


class InventedPipeline(DiffusionPipeline):
    """Guides by two calls per step, which it does not name."""

    def __init__(self, transformer: InventedTransformer, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 28,
        height: int = 512,
        width: int = 512,
        generator: torch.Generator | None = None,
        output_type: str = "latent",
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        latents = torch.randn(1, CHANNELS, height // 8, width // 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            noise = self.transformer(latents, prompt_embeds, t)
            if negative_prompt_embeds is not None:
                negative = self.transformer(latents, negative_prompt_embeds, t)
                noise = negative + guidance_scale * (noise - negative)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return (latents,)
