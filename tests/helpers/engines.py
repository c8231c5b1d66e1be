"""Stand-ins for the transformers and pipelines of engines that embed this package; nothing of diffusers in them."""

from types import SimpleNamespace

import torch
from torch import nn


class QwenBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.image, self.text = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        text = encoder_hidden_states + 0.1 * torch.tanh(self.text(encoder_hidden_states))
        image = hidden_states + 0.1 * torch.tanh(self.image(hidden_states) + text.mean(1, keepdim=True)) * temb
        return text, image


class QwenImageTransformer2DModel(nn.Module):
    """An engine's own version of a class that diffusers has: the same name, nothing of diffusers in it."""

    __module__ = "sglang.multimodal_gen.runtime.models.dits.qwen_image"

    def __init__(self, depth=4):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(QwenBlock() for _ in range(depth))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=1 + 0.1 * timestep
            )
        return hidden_states


class WanBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        return hidden_states + 0.1 * torch.tanh(self.mix(hidden_states) + encoder_hidden_states.mean(1, True)) * temb


class WanTransformer3DModel(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(WanBlock() for _ in range(depth))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, 1 + 0.1 * timestep)
        return hidden_states


@torch.inference_mode()
def denoise(transformers, steps, guided=True, seed=0, first=None):
    """A loop that calls a transformer once per guidance branch without saying so; the first one for ``first`` steps."""
    first = steps // len(transformers) if first is None else first
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 6, 8, generator=generator)
    prompts = torch.randn(2 if guided else 1, 1, 3, 8, generator=generator)
    for step in range(steps):
        transformer = transformers[0 if step < first else -1]
        time = 1 - step / steps
        noise = [transformer(latents, prompt, time) for prompt in prompts]
        latents = latents - sum(noise) / (2 * steps)
    return latents


class FluxNorm(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, hidden_states, emb):
        return hidden_states * (1 + emb) + 0.1 * self.linear(hidden_states), emb


class FluxBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm1, self.text = FluxNorm(dim), nn.Linear(dim, dim)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        normed, _ = self.norm1(hidden_states, emb=temb)
        text = encoder_hidden_states + 0.1 * torch.tanh(self.text(encoder_hidden_states))
        return text, hidden_states + 0.1 * torch.tanh(normed + text.mean(1, keepdim=True))


class FluxTransformer2DModel(nn.Module):
    """Two block lists that carry the same streams."""

    __module__ = "vllm_omni.diffusion.models.flux.flux_transformer"

    def __init__(self, depth=4):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(FluxBlock() for _ in range(depth))
        self.single_transformer_blocks = nn.ModuleList(FluxBlock() for _ in range(depth))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=0.1 * timestep
            )
        for block in self.single_transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=0.1 * timestep
            )
        return hidden_states


class Scheduler:
    """Timesteps evenly spaced from 1000 down."""

    config = SimpleNamespace(num_train_timesteps=1000)
    timesteps = None

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.linspace(1000, 1000 / num_inference_steps, num_inference_steps)


class Pipeline:
    """Denoises as an engine's worker does it, ``guided`` by a second call per step."""

    guided = True
    boundary_ratio = None

    def __init__(self, **transformers):
        vars(self).update(transformers)
        self.names = list(transformers)
        self.scheduler = Scheduler()

    def __call__(self, num_inference_steps, seed=0):
        self.scheduler.set_timesteps(num_inference_steps)
        boundary = 0 if self.boundary_ratio is None else 1000 * self.boundary_ratio
        first = int((self.scheduler.timesteps >= boundary).sum())
        transformers = [getattr(self, name) for name in self.names]
        return denoise(transformers, num_inference_steps, self.guided, seed, first)


def pipeline(name, guided=True, boundary_ratio=None, **transformers):
    """A pipeline whose class has a name of vLLM-Omni's."""
    return type(name, (Pipeline,), {"guided": guided, "boundary_ratio": boundary_ratio})(**transformers)
