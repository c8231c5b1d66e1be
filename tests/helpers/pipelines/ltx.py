"""LTX and LTX-2."""

from __future__ import annotations

from typing import Any

import diffusers

from pipelines.common import Tiny, builds, flow, guided, photo, picture, video


def ltx(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=4,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    components = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    tiny = video(name, 16, components, mask="prompt_attention_mask", **inputs)
    tiny.sizes = {"height": 32, "width": 32, "num_frames": 9}, {"height": 32, "width": 64, "num_frames": 9}
    return tiny


@builds("LTXPipeline")
def _() -> Tiny:
    return ltx("LTXPipeline")


@builds("LTXImageToVideoPipeline")
def _() -> Tiny:
    return ltx("LTXImageToVideoPipeline", image=picture)


@builds("LTXConditionPipeline")
def _() -> Tiny:
    return ltx("LTXConditionPipeline", image=photo)


def ltx2(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=4,
        caption_channels=16,
        rope_double_precision=False,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    components = {"transformer": transformer, "vae": vae, "audio_vae": audio_vae}
    components |= {"connectors": connectors, "scheduler": flow()}
    tiny = guided(name, 32, components, 3, "prompt_attention_mask", **inputs)
    tiny.inputs |= {"stg_scale": 0.0, "modality_scale": 1.0, "frame_rate": 25.0}
    tiny.inputs |= (
        {"audio_guidance_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0} if "HDR" not in name else {}
    )
    tiny.guided |= {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [2]}
    tiny.sizes = {"height": 32, "width": 32, "num_frames": 5}, {"height": 32, "width": 64, "num_frames": 5}
    return tiny


@builds("LTX2Pipeline")
def _() -> Tiny:
    return ltx2("LTX2Pipeline")


@builds("LTX2ImageToVideoPipeline")
def _() -> Tiny:
    return ltx2("LTX2ImageToVideoPipeline", image=picture, image_crf=0)


@builds("LTX2ConditionPipeline")
def _() -> Tiny:
    return ltx2("LTX2ConditionPipeline")


@builds("LTX2InContextPipeline")
def _() -> Tiny:
    return ltx2("LTX2InContextPipeline")


@builds("LTX2HDRPipeline")
def _() -> Tiny:
    return ltx2("LTX2HDRPipeline")
