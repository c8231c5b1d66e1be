"""FLUX.1, FLUX.2, Chroma and VisualCloze."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from pipelines.common import (
    SQUARE,
    Tiny,
    assemble,
    builds,
    control,
    flow,
    image_vae,
    left_half,
    normal,
    photo,
    picture,
)


def flux(name: str, in_channels: int = 8, guided: bool = False, components: Any = (), **inputs: Any) -> Tiny:
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
        name, scheduler=flow(), vae=image_vae(2, shift_factor=0.1), transformer=transformer, **dict(components)
    )
    inputs = {"prompt_embeds": normal(1, 5, 16), "pooled_prompt_embeds": normal(1, 16, seed=1), **inputs}
    negative = {
        "negative_prompt_embeds": normal(1, 5, 16, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 16, seed=3),
    }
    return Tiny(pipe, inputs, {**negative, "true_cfg_scale": 3.0} if guided else {}, branches=2 if guided else 1)


def flux_controlnet() -> dict[str, nn.Module]:
    controlnet = diffusers.FluxControlNetModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return {"controlnet": controlnet}


@builds("FluxPipeline")
def _() -> Tiny:
    return flux("FluxPipeline", guided=True)


@builds("FluxImg2ImgPipeline")
def _() -> Tiny:
    return flux("FluxImg2ImgPipeline", guided=True, image=picture, strength=1.0)


@builds("FluxInpaintPipeline")
def _() -> Tiny:
    return flux("FluxInpaintPipeline", guided=True, image=picture, mask_image=left_half, strength=1.0)


@builds("FluxKontextPipeline")
def _() -> Tiny:
    return flux("FluxKontextPipeline", guided=True, image=picture, _auto_resize=False, max_area=32 * 32)


@builds("FluxKontextInpaintPipeline")
def _() -> Tiny:
    tiny = flux("FluxKontextInpaintPipeline", guided=True, image=picture, mask_image=left_half, strength=1.0)
    tiny.inputs |= {"_auto_resize": False, "max_area": 32 * 32}
    return tiny


@builds("FluxFillPipeline")
def _() -> Tiny:
    return flux("FluxFillPipeline", 8 + 8 + 4 * 4, image=picture, mask_image=left_half, strength=1.0)


@builds("FluxControlPipeline")
def _() -> Tiny:
    return flux("FluxControlPipeline", 16, control_image=control)


@builds("FluxControlImg2ImgPipeline")
def _() -> Tiny:
    return flux("FluxControlImg2ImgPipeline", 16, control_image=control, image=picture, strength=1.0)


@builds("FluxControlInpaintPipeline")
def _() -> Tiny:
    tiny = flux("FluxControlInpaintPipeline", 16, control_image=control, image=picture, mask_image=left_half)
    tiny.inputs["strength"] = 1.0
    return tiny


@builds("FluxControlNetPipeline")
def _() -> Tiny:
    return flux("FluxControlNetPipeline", guided=True, components=flux_controlnet(), control_image=control)


@builds("FluxControlNetImg2ImgPipeline")
def _() -> Tiny:
    tiny = flux("FluxControlNetImg2ImgPipeline", components=flux_controlnet(), control_image=control)
    tiny.inputs |= {"image": picture, "strength": 1.0}
    return tiny


@builds("FluxControlNetInpaintPipeline")
def _() -> Tiny:
    tiny = flux("FluxControlNetInpaintPipeline", components=flux_controlnet(), control_image=control)
    tiny.inputs |= {"image": picture, "mask_image": left_half, "strength": 1.0}
    return tiny


def flux2_vae(channels: int = 2) -> nn.Module:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
    )


def flux2(name: str, guidance_embeds: bool = False, **inputs: Any) -> Tiny:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    pipe = assemble(name, scheduler=flow(use_dynamic_shifting=True), vae=flux2_vae(), transformer=transformer)
    return Tiny(pipe, {"prompt_embeds": normal(1, 5, 16), **inputs})


@builds("Flux2Pipeline")
def _() -> Tiny:
    return flux2("Flux2Pipeline", guidance_embeds=True)


def flux2_klein(name: str, **inputs: Any) -> Tiny:
    tiny = flux2(name, **inputs)
    tiny.inputs["guidance_scale"] = 1.0
    tiny.guided, tiny.branches = {"negative_prompt_embeds": normal(1, 5, 16, seed=1), "guidance_scale": 4.0}, 2
    return tiny


@builds("Flux2KleinPipeline")
def _() -> Tiny:
    return flux2_klein("Flux2KleinPipeline")


@builds("Flux2KleinInpaintPipeline")
def _() -> Tiny:
    return flux2_klein("Flux2KleinInpaintPipeline", image=picture, mask_image=left_half, strength=1.0)


def chroma(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    transformer.register_to_config(guidance_embeds=False)  # the inpainting pipeline asks for it
    mask = torch.ones(1, 5)
    return Tiny(
        assemble(name, scheduler=flow(), vae=image_vae(2, shift_factor=0.1), transformer=transformer),
        {"prompt_embeds": normal(1, 5, 16), "prompt_attention_mask": mask, "guidance_scale": 1.0, **inputs},
        {
            "negative_prompt_embeds": normal(1, 5, 16, seed=1),
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 4.0,
        },
        branches=2,
    )


@builds("ChromaPipeline")
def _() -> Tiny:
    return chroma("ChromaPipeline")


@builds("ChromaImg2ImgPipeline")
def _() -> Tiny:
    return chroma("ChromaImg2ImgPipeline", image=picture, strength=1.0)


@builds("ChromaInpaintPipeline")
def _() -> Tiny:
    return chroma("ChromaInpaintPipeline", image=picture, mask_image=left_half, strength=1.0)


@builds("VisualClozeGenerationPipeline")
def _() -> Tiny:
    tiny = flux("VisualClozeGenerationPipeline", 8 + 8 + 16, components={"resolution": 32})
    del tiny.inputs["prompt_embeds"], tiny.inputs["pooled_prompt_embeds"]
    tiny.inputs |= {"task_prompt": "a task", "content_prompt": "a cat"}
    tiny.pipe.encode_prompt = lambda **_: (normal(1, 5, 16), normal(1, 16, seed=1), torch.zeros(5, 3))
    example, query = [photo(**SQUARE), photo(**SQUARE)], [photo(**SQUARE), None]
    tiny.sizes = {"image": [example, query]}, {"image": [example, example, query]}
    return tiny


@builds("Flux2KleinKVPipeline")
def _() -> Tiny:
    tiny = flux2("Flux2KleinKVPipeline", image=photo)
    tiny.sizes = {"height": 64, "width": 64}, {"height": 64, "width": 96}
    return tiny
