"""Tiny pipelines that make videos."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from pipelines_common import Tiny, assemble, builds, normal, wan_vae

SMALL = {"height": 16, "width": 16, "num_frames": 9}
WIDE = {"height": 16, "width": 32, "num_frames": 5}


# Wan


def wan_transformer(in_channels: int = 16, **kwargs: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
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


def text_to_video(name: str, **components: Any) -> Tiny:
    """A pipeline that takes prompt_embeds and negative_prompt_embeds and calls its transformer for each in turn."""
    return Tiny(
        assemble(name, **components),
        {"prompt_embeds": normal(1, 5, 16), "guidance_scale": 1.0},
        {"negative_prompt_embeds": normal(1, 5, 16, seed=1), "guidance_scale": 4.0},
        branches=2,
        sizes=(SMALL, WIDE),
    )


@builds("WanPipeline")
def _() -> Tiny:
    return text_to_video(
        "WanPipeline",
        vae=wan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(),
    )


@builds("WanPipeline, two transformers")
def _() -> Tiny:
    return text_to_video(
        "WanPipeline",
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.5,
    )


@builds("HeliosPipeline")
def _() -> Tiny:
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
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    tiny = text_to_video("HeliosPipeline", vae=wan_vae(), scheduler=scheduler, transformer=transformer)
    tiny.inputs |= {"num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}
    tiny.sizes = ({**SMALL, "num_frames": 17}, WIDE)  # two chunks, one chunk
    return tiny
