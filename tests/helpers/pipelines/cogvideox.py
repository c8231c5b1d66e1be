"""CogView, CogVideoX and ConsisID."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import diffusers
from torch import nn

from pipelines.common import (
    SMALL,
    SMALL_SQUARE,
    SMALL_WIDE,
    WIDE_VIDEO,
    Tiny,
    builds,
    clip,
    control,
    flow,
    guided,
    image_vae,
    normal,
    photo,
    video,
)


@builds("CogView3PlusPipeline")
def _() -> Tiny:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=8,
    )
    components = {"transformer": transformer, "vae": image_vae(), "scheduler": diffusers.CogVideoXDDIMScheduler()}
    return guided("CogView3PlusPipeline", 16, components)


def cogview4(name: str, in_channels: int = 4, **inputs: Any) -> Tiny:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=in_channels,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = flow(use_dynamic_shifting=True, time_shift_type="linear")
    components = {"transformer": transformer, "vae": image_vae(), "scheduler": scheduler}
    return guided(name, 16, components, 2, **inputs)


@builds("CogView4Pipeline")
def _() -> Tiny:
    return cogview4("CogView4Pipeline")


@builds("CogView4ControlPipeline")
def _() -> Tiny:
    return cogview4("CogView4ControlPipeline", 8, control_image=control)


def cogvideox_vae() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def cogvideox_transformer(cls: str = "CogVideoXTransformer3DModel", in_channels: int = 4, **kwargs: Any) -> nn.Module:
    return getattr(diffusers, cls)(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=4,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        **kwargs,
    )


def cogvideox(name: str, transformer: nn.Module, **inputs: Any) -> Tiny:
    components = {"transformer": transformer, "vae": cogvideox_vae(), "scheduler": diffusers.CogVideoXDDIMScheduler()}
    return video(name, 16, components, **inputs)


@builds("CogVideoXPipeline")
def _() -> Tiny:
    return cogvideox("CogVideoXPipeline", cogvideox_transformer())


@builds("CogVideoXImageToVideoPipeline")
def _() -> Tiny:
    return cogvideox("CogVideoXImageToVideoPipeline", cogvideox_transformer(in_channels=8), image=photo)


@builds("CogVideoXVideoToVideoPipeline")
def _() -> Tiny:
    tiny = cogvideox("CogVideoXVideoToVideoPipeline", cogvideox_transformer(), strength=1.0)
    tiny.sizes = tuple(
        {**size, "video": clip(**frames)} for size, frames in zip((SMALL_SQUARE, SMALL_WIDE), (SMALL, WIDE_VIDEO))
    )
    return tiny


@builds("CogVideoXFunControlPipeline")
def _() -> Tiny:
    tiny = cogvideox("CogVideoXFunControlPipeline", cogvideox_transformer(in_channels=8))
    tiny.sizes = tuple(
        {**size, "control_video": clip(**frames)}
        for size, frames in zip((SMALL_SQUARE, SMALL_WIDE), (SMALL, WIDE_VIDEO))
    )
    return tiny


@builds("ConsisIDPipeline")
def _() -> Tiny:
    transformer = cogvideox_transformer(
        "ConsisIDTransformer3DModel",
        8,
        cross_attn_interval=2,
        is_kps=False,
        is_train_face=True,
        cross_attn_dim_head=1,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    with mock.patch.dict(sys.modules, cv2=mock.Mock()):  # it only draws key points with it
        from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    components = {"transformer": transformer, "vae": cogvideox_vae(), "scheduler": diffusers.CogVideoXDDIMScheduler()}
    tiny = video(ConsisIDPipeline, 16, components, image=photo)
    tiny.inputs |= {"id_vit_hidden": [normal(1, 2, 2)], "id_cond": normal(1, 2)}
    return tiny
