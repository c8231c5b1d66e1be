"""HunyuanDiT, HunyuanImage and HunyuanVideo."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from pipelines.common import SQUARE, WIDE, Encoder, Tiny, builds, control, flow, guided, image_vae, normal, photo, video


def hunyuan_dit(name: str, components: Any = (), **inputs: Any) -> Tiny:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=6,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        hidden_size=16,
        text_len=5,
        text_len_t5=5,
    )
    components = {
        "transformer": transformer,
        "vae": image_vae(4, 4),
        "scheduler": diffusers.DDPMScheduler(),
        **dict(components),
    }
    tiny = guided(name, 16, components, mask="prompt_attention_mask", use_resolution_binning=False, **inputs)
    tiny.sizes = (
        {"height": 128, "width": 128},
        {"height": 128, "width": 160},
    )  # it takes a VAE that scales by 8 for granted
    ones = torch.ones(1, 5, dtype=torch.long)
    tiny.inputs |= {"prompt_embeds_2": normal(1, 5, 16, seed=2), "prompt_attention_mask_2": ones}
    tiny.guided |= {"negative_prompt_embeds_2": normal(1, 5, 16, seed=3), "negative_prompt_attention_mask_2": ones}
    return tiny


@builds("HunyuanDiTPipeline")
def _() -> Tiny:
    return hunyuan_dit("HunyuanDiTPipeline")


@builds("HunyuanDiTPAGPipeline")
def _() -> Tiny:
    return hunyuan_dit("HunyuanDiTPAGPipeline", {"pag_applied_layers": ["blocks.1"]})


@builds("HunyuanDiTControlNetPipeline")
def _() -> Tiny:
    controlnet = diffusers.HunyuanDiT2DControlNetModel(
        sample_size=16,
        transformer_num_layers=6,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        hidden_size=16,
        text_len=5,
        text_len_t5=5,
    )
    return hunyuan_dit("HunyuanDiTControlNetPipeline", {"controlnet": controlnet}, control_image=control)


@builds("HunyuanImagePipeline")
def _() -> Tiny:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
    )
    guiders = {name: diffusers.AdaptiveProjectedMixGuidance() for name in ("guider", "ocr_guider")}
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(shift=7.0), **guiders}
    tiny = guided("HunyuanImagePipeline", 16, components, 2, "prompt_embeds_mask")
    mask = torch.ones(1, 4, dtype=torch.long)
    tiny.inputs |= {"prompt_embeds_2": normal(1, 4, 16, seed=2), "prompt_embeds_mask_2": mask}
    tiny.inputs |= tiny.guided | {
        "negative_prompt_embeds_2": normal(1, 4, 16, seed=3),
        "negative_prompt_embeds_mask_2": mask,
    }
    tiny.guided = {}
    del tiny.inputs["guidance_scale"]
    return tiny


def hunyuan_vae(channels: int = 4) -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def hunyuan_video(name: str, cls: str = "HunyuanVideoTransformer3DModel", in_channels: int = 4, **inputs: Any) -> Tiny:
    extra = inputs.pop("extra", {})
    transformer = getattr(diffusers, cls)(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
        **{"patch_size": 1, "patch_size_t": 1, "guidance_embeds": True, **extra},
    )
    components = {"transformer": transformer, "vae": hunyuan_vae(), "scheduler": flow(shift=7.0)}
    return video(
        name,
        16,
        components,
        2,
        mask="prompt_attention_mask",
        pooled=("pooled_prompt_embeds", 16),
        scale="true_cfg_scale",
        **inputs,
    )


@builds("HunyuanVideoPipeline")
def _() -> Tiny:
    return hunyuan_video("HunyuanVideoPipeline")


@builds("HunyuanVideoImageToVideoPipeline")
def _() -> Tiny:
    extra = {"image_condition_type": "latent_concat", "guidance_embeds": False}
    return hunyuan_video("HunyuanVideoImageToVideoPipeline", in_channels=9, extra=extra, image=photo)


@builds("HunyuanVideoImageToVideoPipeline + token replacement")
def _() -> Tiny:
    extra = {"image_condition_type": "token_replace"}
    return hunyuan_video("HunyuanVideoImageToVideoPipeline", extra=extra, image=photo)


@builds("HunyuanSkyreelsImageToVideoPipeline")
def _() -> Tiny:
    return hunyuan_video("HunyuanSkyreelsImageToVideoPipeline", in_channels=8, image=photo)


@builds("HunyuanVideoFramepackPipeline")
def _() -> Tiny:
    extra = {"patch_size": 2, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    tiny = hunyuan_video(
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoFramepackTransformer3DModel",
        extra=extra,
        image=photo,
        latent_window_size=3,
    )
    tiny.pipe.encode_image = lambda *_, **__: normal(1, 4, 16, seed=7)
    tiny.sizes = {"height": 32, "width": 32, "num_frames": 9}, {"height": 32, "width": 48, "num_frames": 9}
    return tiny


def hunyuan_video15(name: str, task: str, **more: Any) -> Tiny:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type=task,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(shift=7.0), "guider": guider, **more}
    tiny = video(name, 16, components, 2, mask="prompt_embeds_mask")
    mask = torch.ones(1, 4, dtype=torch.long)
    tiny.inputs |= {"prompt_embeds_2": normal(1, 4, 16, seed=2), "prompt_embeds_mask_2": mask}
    tiny.inputs |= tiny.guided | {
        "negative_prompt_embeds_2": normal(1, 4, 16, seed=3),
        "negative_prompt_embeds_mask_2": mask,
    }
    tiny.guided = {}
    del tiny.inputs["guidance_scale"]
    return tiny


@builds("HunyuanVideo15Pipeline")
def _() -> Tiny:
    return hunyuan_video15("HunyuanVideo15Pipeline", "t2v")


@builds("HunyuanImageRefinerPipeline")
def _() -> Tiny:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        text_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    guider = diffusers.AdaptiveProjectedMixGuidance()
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(shift=4.0), "guider": guider}
    tiny = guided("HunyuanImageRefinerPipeline", 16, components, 2, "prompt_embeds_mask", image=photo)
    tiny.inputs |= tiny.guided
    tiny.guided = {}
    del tiny.inputs["guidance_scale"]
    return tiny


@builds("HunyuanVideo15ImageToVideoPipeline")
def _() -> Tiny:

    tiny = hunyuan_video15("HunyuanVideo15ImageToVideoPipeline", "i2v", feature_extractor=Encoder())
    tiny.pipe.encode_image = lambda *_, **__: normal(1, 3, 12, seed=7)
    tiny.pipe._get_image_embeds = lambda *_, **__: normal(1, 3, 12, seed=7)
    tiny.sizes = tuple({"image": photo(**size), "num_frames": 5} for size in (SQUARE, WIDE))
    return tiny
