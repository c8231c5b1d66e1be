"""Other pipelines that make videos."""

from __future__ import annotations

from typing import Any

import diffusers

from pipelines.common import (
    Encoder,
    Tiny,
    builds,
    flow,
    guided,
    image_vae,
    photo,
    video,
    wan_vae,
)


@builds("AllegroPipeline")
def _() -> Tiny:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    components = {"transformer": transformer, "vae": vae, "scheduler": diffusers.DDIMScheduler()}
    tiny = video("AllegroPipeline", 16, components, mask="prompt_attention_mask", negative_prompt=None)
    tiny.sizes = {"height": 16, "width": 16, "num_frames": 8}, {"height": 16, "width": 32, "num_frames": 8}
    return tiny


@builds("LattePipeline")
def _() -> Tiny:
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        attention_bias=True,
        caption_channels=16,
        video_length=3,
    )
    components = {"transformer": transformer, "vae": image_vae(), "scheduler": diffusers.DDIMScheduler()}
    tiny = video("LattePipeline", 16, components, clean_caption=False, negative_prompt=None)
    tiny.sizes = {"height": 16, "width": 16, "video_length": 3}, {"height": 16, "width": 32, "video_length": 3}
    return tiny


@builds("EasyAnimatePipeline")
def _() -> Tiny:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=4,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(), "text_encoder": Encoder()}
    return video("EasyAnimatePipeline", 16, components, mask="prompt_attention_mask")


@builds("MochiPipeline")
def _() -> Tiny:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    components = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    tiny = video("MochiPipeline", 16, components, 1, mask="prompt_attention_mask")
    for branch in (tiny.inputs, tiny.guided):
        branch |= {name: value.bool() for name, value in branch.items() if name.endswith("mask")}
    tiny.sizes = {"height": 16, "width": 16, "num_frames": 7}, {"height": 16, "width": 32, "num_frames": 7}
    return tiny


def motif_video(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        num_single_layers=4,
        num_decoder_layers=2,
        patch_size=1,
        text_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    components = {"transformer": transformer, "vae": wan_vae(), "scheduler": flow(shift=7.0), "guider": guider}
    tiny = guided(name, 16, components, 2, "prompt_attention_mask", **inputs)
    tiny.inputs |= tiny.guided
    tiny.guided = {}
    del tiny.inputs["guidance_scale"]
    tiny.sizes = {"height": 16, "width": 16, "num_frames": 9}, {"height": 16, "width": 32, "num_frames": 5}
    return tiny


@builds("MotifVideoPipeline")
def _() -> Tiny:
    return motif_video("MotifVideoPipeline")


@builds("MotifVideoImage2VideoPipeline")
def _() -> Tiny:
    return motif_video("MotifVideoImage2VideoPipeline", image=photo, prompt=None)
