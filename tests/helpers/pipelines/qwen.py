"""Qwen-Image and Krea 2."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from pipelines.common import (
    SQUARE,
    WIDE,
    Encoder,
    Tiny,
    builds,
    control,
    flow,
    guided,
    left_half,
    normal,
    photo,
    picture,
)


def qwen_vae(channels: int = 4) -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def qwen_transformer(**kwargs: Any) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **kwargs,
    )


def qwen_image(name: str, components: Any = (), transformer: nn.Module | None = None, **inputs: Any) -> Tiny:
    components = {"scheduler": flow(use_dynamic_shifting=True), "vae": qwen_vae(), **dict(components)}
    components["transformer"] = transformer or qwen_transformer()
    return guided(name, 16, components, 2, "prompt_embeds_mask", scale="true_cfg_scale", **inputs)


def qwen_controlnet(extra_channels: int = 0) -> dict[str, nn.Module]:
    controlnet = diffusers.QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        extra_condition_channels=extra_channels,
    )
    return {"controlnet": controlnet}


def scaled_down(module: str, *more: Any) -> dict[str, Any]:
    """Patches a Qwen pipeline's target size, about a megapixel, to 32 pixels."""
    name = f"diffusers.pipelines.qwenimage.{module}.calculate_dimensions"
    return {name: lambda area, ratio: (round(32 * ratio), 32, *more)}


@builds("QwenImagePipeline")
def _() -> Tiny:
    return qwen_image("QwenImagePipeline")


@builds("QwenImageImg2ImgPipeline")
def _() -> Tiny:
    return qwen_image("QwenImageImg2ImgPipeline", image=picture, strength=1.0)


@builds("QwenImageInpaintPipeline")
def _() -> Tiny:
    return qwen_image("QwenImageInpaintPipeline", image=picture, mask_image=left_half, strength=1.0)


@builds("QwenImageEditPipeline")
def _() -> Tiny:
    tiny = qwen_image("QwenImageEditPipeline", image=photo)
    tiny.patches = scaled_down("pipeline_qwenimage_edit", None)
    return tiny


@builds("QwenImageEditInpaintPipeline")
def _() -> Tiny:
    tiny = qwen_image("QwenImageEditInpaintPipeline", image=photo, mask_image=left_half, strength=1.0)
    tiny.patches = scaled_down("pipeline_qwenimage_edit_inpaint", None)
    return tiny


@builds("QwenImageEditPlusPipeline")
def _() -> Tiny:
    tiny = qwen_image("QwenImageEditPlusPipeline", image=lambda **size: [photo(**size), photo(**size)])
    tiny.patches = scaled_down("pipeline_qwenimage_edit_plus")
    return tiny


@builds("QwenImageLayeredPipeline")
def _() -> Tiny:
    transformer = qwen_transformer(use_additional_t_cond=True, use_layer3d_rope=True)
    tiny = qwen_image("QwenImageLayeredPipeline", {"text_encoder": Encoder()}, transformer, layers=2, prompt="a cat")
    tiny.inputs["output_type"] = "pt"
    tiny.sizes = {"image": photo(**SQUARE)}, {"image": photo(**WIDE)}
    tiny.patches = scaled_down("pipeline_qwenimage_layered")
    return tiny


@builds("QwenImageControlNetPipeline")
def _() -> Tiny:
    return qwen_image("QwenImageControlNetPipeline", qwen_controlnet(), control_image=control)


@builds("QwenImageControlNetInpaintPipeline")
def _() -> Tiny:
    tiny = qwen_image("QwenImageControlNetInpaintPipeline", qwen_controlnet(4), control_image=control)
    tiny.inputs["control_mask"] = left_half
    return tiny


@builds("Krea2Pipeline")
def _() -> Tiny:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    components = {"transformer": transformer, "vae": qwen_vae(), "scheduler": flow(use_dynamic_shifting=True)}
    tiny = guided("Krea2Pipeline", 16, components, 2, "prompt_embeds_mask")
    tiny.inputs["guidance_scale"] = 0.0  # its guidance starts above 0, not 1
    mask = torch.ones(1, 5, dtype=torch.bool)
    tiny.inputs |= {"prompt_embeds": normal(1, 5, 3, 16), "prompt_embeds_mask": mask}
    tiny.guided |= {"negative_prompt_embeds": normal(1, 5, 3, 16, seed=1), "negative_prompt_embeds_mask": mask}
    return tiny


class Processor(Encoder):
    """What Qwen-Image 2.1 and Cosmos 3 ask their processor or tokenizer at the start."""

    tokenizer, eos_token_id = property(lambda self: self), 2

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [1]

    def convert_tokens_to_ids(self, text: str) -> int:
        return 1


def qwen_image21(**inputs: Any) -> Tiny:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        mlp_ratio=2,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(use_dynamic_shifting=True)}
    components["processor"] = Processor()
    tiny = guided("QwenImage21Pipeline", 16, components, 2, "prompt_embeds_mask", scale="true_cfg_scale", **inputs)
    tiny.sizes = {"height": 64, "width": 64}, {"height": 64, "width": 96}
    return tiny


@builds("QwenImage21Pipeline")
def _() -> Tiny:
    return qwen_image21(use_kv_cache=False)


@builds("QwenImage21Pipeline + its key-value cache")
def _() -> Tiny:
    return qwen_image21(use_kv_cache=True)
