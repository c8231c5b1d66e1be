"""Sana, for images and videos."""

from __future__ import annotations

from typing import Any

import diffusers

from pipelines.common import SQUARE, Tiny, builds, control, flow, guided, image_vae, photo, picture, video, wan_vae


def pixart(name: str, components: Any = (), **inputs: Any) -> Tiny:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
    )
    components = {
        "transformer": transformer,
        "vae": image_vae(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
        **dict(components),
    }
    inputs |= {"use_resolution_binning": False, "negative_prompt": None}
    return guided(name, 16, components, mask="prompt_attention_mask", **inputs)


@builds("PixArtAlphaPipeline")
def _() -> Tiny:
    return pixart("PixArtAlphaPipeline")


@builds("PixArtSigmaPipeline")
def _() -> Tiny:
    return pixart("PixArtSigmaPipeline")


@builds("PixArtSigmaPAGPipeline")
def _() -> Tiny:
    return pixart("PixArtSigmaPAGPipeline", {"pag_applied_layers": ["blocks.1"]})


def sana_parts(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 16,
        **kwargs,
    }


def sana(name: str, components: Any = (), **inputs: Any) -> Tiny:
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    transformer = diffusers.SanaTransformer2DModel(**sana_parts())
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(shift=7.0), **dict(components)}
    inputs |= {"use_resolution_binning": False, "negative_prompt": None}
    tiny = guided(name, 16, components, mask="prompt_attention_mask", **inputs)
    tiny.sizes = SQUARE, {"height": 32, "width": 64}
    return tiny


@builds("SanaPipeline")
def _() -> Tiny:
    return sana("SanaPipeline")


@builds("SanaPAGPipeline")
def _() -> Tiny:
    return sana("SanaPAGPipeline", {"pag_applied_layers": ["blocks.1"]})


@builds("SanaControlNetPipeline")
def _() -> Tiny:
    controlnet = diffusers.SanaControlNetModel(**sana_parts(num_layers=2))
    return sana("SanaControlNetPipeline", {"controlnet": controlnet}, control_image=control)


def sana_sprint(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.SanaTransformer2DModel(**sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads"))
    tiny = sana(name, {"transformer": transformer, "scheduler": diffusers.SCMScheduler()}, **inputs)
    tiny.guided = {}
    tiny.inputs |= {"intermediate_timesteps": None}
    del tiny.inputs["negative_prompt"]
    return tiny


@builds("SanaSprintPipeline")
def _() -> Tiny:
    return sana_sprint("SanaSprintPipeline")


@builds("SanaSprintImg2ImgPipeline")
def _() -> Tiny:
    return sana_sprint("SanaSprintImg2ImgPipeline", image=picture, strength=1.0)


def sana_video(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    components = {"transformer": transformer, "vae": wan_vae(), "scheduler": scheduler}
    inputs |= {"negative_prompt": None, "use_resolution_binning": False}
    tiny = video(name, 16, components, mask="prompt_attention_mask", **inputs)
    tiny.sizes = {"height": 32, "width": 32, "frames": 9}, {"height": 32, "width": 64, "frames": 5}
    return tiny


@builds("SanaVideoPipeline")
def _() -> Tiny:
    return sana_video("SanaVideoPipeline")


@builds("SanaImageToVideoPipeline")
def _() -> Tiny:
    return sana_video("SanaImageToVideoPipeline", image=photo)


@builds("SanaWMPipeline")
def _() -> Tiny:
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        caption_channels=16,
        image_size=32,
        chunk_plucker_channels=12,
        chunk_plucker_post_attn_blocks=4,
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
    components = {"transformer": transformer, "vae": vae, "scheduler": flow()}
    tiny = guided("SanaWMPipeline", 16, components, mask="prompt_attention_mask", image=photo, prompt="")
    for given in (tiny.inputs, tiny.guided):
        given |= {name: value.unsqueeze(1) for name, value in given.items() if name.endswith("prompt_embeds")}
    tiny.inputs |= {"action": "w-8", "intrinsics": [30.0, 30.0, 16.0, 16.0], "num_frames": 9}
    return tiny
