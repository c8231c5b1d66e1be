"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from pipelines.common import Tiny, builds, control, flow, guided, image_vae, left_half, picture


def sd3_transformer(cls: str = "SD3Transformer2DModel", layers: int = 4, **kwargs: Any) -> nn.Module:
    return getattr(diffusers, cls)(
        sample_size=16,
        patch_size=2,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        **{"in_channels": 4, "out_channels": 4, **kwargs},
    )


def sd3(name: str, components: Any = (), channels: int = 4, **inputs: Any) -> Tiny:
    transformer = sd3_transformer(in_channels=channels, out_channels=channels)
    components = {
        "vae": image_vae(channels, shift_factor=0.1),
        "scheduler": flow(),
        "transformer": transformer,
        **dict(components),
    }
    return guided(name, 16, components, pooled=("pooled_prompt_embeds", 16), **inputs)


@builds("StableDiffusion3Pipeline")
def _() -> Tiny:
    return sd3("StableDiffusion3Pipeline")


@builds("StableDiffusion3Pipeline + dual attention")
def _() -> Tiny:
    return sd3(
        "StableDiffusion3Pipeline", {"transformer": sd3_transformer(dual_attention_layers=(0, 1), qk_norm="rms_norm")}
    )


@builds("StableDiffusion3Img2ImgPipeline")
def _() -> Tiny:
    return sd3("StableDiffusion3Img2ImgPipeline", image=picture, strength=1.0)


@builds("StableDiffusion3InpaintPipeline")
def _() -> Tiny:
    return sd3("StableDiffusion3InpaintPipeline", channels=16, image=picture, mask_image=left_half, strength=1.0)


@builds("StableDiffusion3PAGPipeline")
def _() -> Tiny:
    return sd3("StableDiffusion3PAGPipeline", {"pag_applied_layers": ["blocks.1"]})


@builds("StableDiffusion3PAGImg2ImgPipeline")
def _() -> Tiny:
    components = {"pag_applied_layers": ["blocks.1"]}
    return sd3("StableDiffusion3PAGImg2ImgPipeline", components, image=picture, strength=1.0)


@builds("StableDiffusion3ControlNetPipeline")
def _() -> Tiny:
    controlnet = sd3_transformer("SD3ControlNetModel", 2)
    return sd3("StableDiffusion3ControlNetPipeline", {"controlnet": controlnet}, control_image=control)


@builds("StableDiffusion3ControlNetInpaintingPipeline")
def _() -> Tiny:
    controlnet = sd3_transformer("SD3ControlNetModel", 2, extra_conditioning_channels=1)
    tiny = sd3("StableDiffusion3ControlNetInpaintingPipeline", {"controlnet": controlnet}, control_image=control)
    tiny.inputs["control_mask"] = left_half
    return tiny
