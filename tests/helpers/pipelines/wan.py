"""Wan, and what is built like it."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from pipelines.common import (
    SMALL,
    SMALL_SQUARE,
    SMALL_WIDE,
    SQUARE,
    WIDE_VIDEO,
    Tiny,
    builds,
    clip,
    flow,
    normal,
    photo,
    video,
    wan_vae,
)

IMAGE_DIMS = {"image_dim": 4, "added_kv_proj_dim": 24}


def wan_transformer(cls: str = "WanTransformer3DModel", in_channels: int = 16, **kwargs: Any) -> nn.Module:
    return getattr(diffusers, cls)(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
        **kwargs,
    )


def wan(name: str, transformer: nn.Module, scheduler: Any = None, components: Any = (), **inputs: Any) -> Tiny:
    components = {
        "vae": wan_vae(),
        "scheduler": scheduler or flow(shift=7.0),
        "transformer": transformer,
        **dict(components),
    }
    tiny = video(name, 16, components, 2, **inputs)
    tiny.pipe.encode_image = lambda *_, **__: normal(1, 4, 4, seed=7)
    return tiny


def unipc(**kwargs: Any) -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **kwargs)


@builds("WanPipeline")
def _() -> Tiny:
    return wan("WanPipeline", wan_transformer())


@builds("WanPipeline + two transformers")
def _() -> Tiny:
    components = {"transformer_2": wan_transformer(), "boundary_ratio": 0.5}
    return wan("WanPipeline", wan_transformer(), unipc(), components)


@builds("WanPipeline + a timestep per token")
def _() -> Tiny:
    return wan("WanPipeline", wan_transformer(), components={"expand_timesteps": True})


@builds("WanImageToVideoPipeline")
def _() -> Tiny:
    transformer = wan_transformer(in_channels=36, **IMAGE_DIMS)
    return wan("WanImageToVideoPipeline", transformer, image=photo)


@builds("WanImageToVideoPipeline + two transformers")
def _() -> Tiny:
    components = {"transformer_2": wan_transformer(in_channels=36), "boundary_ratio": 0.5}
    return wan("WanImageToVideoPipeline", wan_transformer(in_channels=36), unipc(), components, image=photo)


@builds("WanVideoToVideoPipeline")
def _() -> Tiny:
    tiny = wan("WanVideoToVideoPipeline", wan_transformer(), unipc(), strength=1.0)
    tiny.sizes = tuple(
        {**size, "video": clip(**frames)} for size, frames in zip((SMALL_SQUARE, SMALL_WIDE), (SMALL, WIDE_VIDEO))
    )
    return tiny


@builds("WanVACEPipeline")
def _() -> Tiny:
    transformer = wan_transformer("WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=96)
    tiny = wan("WanVACEPipeline", transformer, video=clip)
    tiny.inputs["mask"] = lambda **size: clip(**size, mode="L")
    return tiny


@builds("WanAnimatePipeline")
def _() -> Tiny:
    transformer = wan_transformer(
        "WanAnimateTransformer3DModel",
        in_channels=36,
        latent_channels=16,
        **IMAGE_DIMS,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    tiny = wan("WanAnimatePipeline", transformer, image=photo)
    poses = [clip(height=size["height"], width=size["width"], num_frames=5) for size in (SMALL, WIDE_VIDEO)]
    face = clip(height=16, width=16, num_frames=5)
    tiny.inputs["segment_frame_length"] = 5
    tiny.sizes = tuple(
        {**size, "pose_video": pose, "face_video": face} for size, pose in zip((SMALL_SQUARE, SMALL_WIDE), poses)
    )
    return tiny


@builds("LucyEditPipeline")
def _() -> Tiny:
    return wan("LucyEditPipeline", wan_transformer(in_channels=32), video=clip)


@builds("ChronoEditPipeline")
def _() -> Tiny:
    transformer = wan_transformer("ChronoEditTransformer3DModel", 36, **IMAGE_DIMS)
    return wan("ChronoEditPipeline", transformer, image=photo)


@builds("AnyFlowPipeline")
def _() -> Tiny:
    transformer = wan_transformer("AnyFlowTransformer3DModel")
    tiny = wan("AnyFlowPipeline", transformer, diffusers.FlowMapEulerDiscreteScheduler(shift=5.0))
    tiny.branches = 1
    return tiny


def helios(name: str, **scheduler: Any) -> Tiny:
    transformer = diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        rope_dim=(4, 4, 4),
    )
    return wan(
        name,
        transformer,
        diffusers.HeliosScheduler(**scheduler),
        num_latent_frames_per_chunk=3,
        history_sizes=[4, 2, 1],
    )


@builds("HeliosPipeline")
def _() -> Tiny:
    tiny = helios("HeliosPipeline", stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    tiny.sizes = {**SMALL, "num_frames": 17}, WIDE_VIDEO  # two chunks, one chunk
    return tiny


@builds("HeliosPyramidPipeline")
def _() -> Tiny:
    tiny = helios("HeliosPyramidPipeline", stage_range=[0, 0.5, 1], stages=2, gamma=0.3)
    tiny.sizes = {**SQUARE, "num_frames": 9}, {"height": 32, "width": 64, "num_frames": 9}
    tiny.steps = lambda steps: {"pyramid_num_inference_steps_list": [steps, steps]}  # at half the size, and in full
    return tiny
