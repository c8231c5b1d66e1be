"""Tiny pipelines that make images."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from pipelines_common import Tiny, assemble, builds, image_vae, normal, picture

# FLUX.1


def flux(name: str, in_channels: int = 8, guided: bool = False, **inputs: Any) -> Tiny:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=8,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = assemble(
        name,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(2, shift_factor=0.1),
        transformer=transformer,
    )
    negative = {
        "negative_prompt_embeds": normal(1, 5, 16, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 16, seed=3),
        "true_cfg_scale": 3.0,
    }
    inputs = {"prompt_embeds": normal(1, 5, 16), "pooled_prompt_embeds": normal(1, 16, seed=1), **inputs}
    return Tiny(pipe, inputs, negative if guided else {}, branches=2 if guided else 1)


@builds("FluxPipeline")
def _() -> Tiny:
    return flux("FluxPipeline", guided=True)


@builds("FluxImg2ImgPipeline")
def _() -> Tiny:
    return flux("FluxImg2ImgPipeline", guided=True, image=picture(), strength=1.0)


# Qwen-Image


def qwen_image(name: str, in_channels: int = 16, **inputs: Any) -> Tiny:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=in_channels,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mask = torch.ones(1, 5, dtype=torch.long)
    return Tiny(
        assemble(name, scheduler=scheduler, vae=vae, transformer=transformer),
        {"prompt_embeds": normal(1, 5, 16), "prompt_embeds_mask": mask, **inputs},
        {
            "negative_prompt_embeds": normal(1, 5, 16, seed=1),
            "negative_prompt_embeds_mask": mask,
            "true_cfg_scale": 3.0,
        },
        branches=2,
    )


@builds("QwenImagePipeline")
def _() -> Tiny:
    return qwen_image("QwenImagePipeline")
