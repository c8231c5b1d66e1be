"""Cosmos 1, 2, 2.5 and 3."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from pipelines.common import (
    SMALL_SQUARE,
    SMALL_WIDE,
    SQUARE,
    WIDE,
    SafetyChecker,
    Tiny,
    assemble,
    builds,
    clip,
    flow,
    photo,
    video,
    wan_vae,
)
from pipelines.qwen import Processor
from pipelines.wan import unipc


def cosmos_transformer(in_channels: int, out_channels: int, **kwargs: Any) -> nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,  # which torchvision would resize
        **kwargs,
    )


def cosmos(
    name: str, transformer: nn.Module, scheduler: Any, vae: nn.Module, components: Any = (), **inputs: Any
) -> Tiny:
    components = {
        "transformer": transformer,
        "scheduler": scheduler,
        "vae": vae,
        "safety_checker": SafetyChecker(),
        **dict(components),
    }
    return video(name, 16, components, 2, **inputs)


def cosmos1(name: str, in_channels: int, **inputs: Any) -> Tiny:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
    )
    transformer = cosmos_transformer(in_channels, 4, extra_pos_embed_type="learnable")
    return cosmos(name, transformer, scheduler, vae, **inputs)


@builds("CosmosTextToWorldPipeline")
def _() -> Tiny:
    return cosmos1("CosmosTextToWorldPipeline", 4)


@builds("CosmosVideoToWorldPipeline")
def _() -> Tiny:
    return cosmos1("CosmosVideoToWorldPipeline", 5, image=photo)


def cosmos2(name: str, in_channels: int, **inputs: Any) -> Tiny:
    scheduler = flow(use_karras_sigmas=True)
    return cosmos(name, cosmos_transformer(in_channels, 16), scheduler, wan_vae(), **inputs)


@builds("Cosmos2TextToImagePipeline")
def _() -> Tiny:
    tiny = cosmos2("Cosmos2TextToImagePipeline", 16)
    tiny.sizes = SMALL_SQUARE, SMALL_WIDE
    return tiny


@builds("Cosmos2VideoToWorldPipeline")
def _() -> Tiny:
    return cosmos2("Cosmos2VideoToWorldPipeline", 17, image=photo)


@builds("Cosmos2_5_PredictBasePipeline")
def _() -> Tiny:
    transformer = cosmos_transformer(17, 16)
    return cosmos("Cosmos2_5_PredictBasePipeline", transformer, unipc(), wan_vae())


@builds("Cosmos3OmniPipeline")
def _() -> Tiny:
    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        latent_channel=16,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=4,
        num_key_value_heads=1,
        patch_latent_dim=16,
        rope_axes_dim=[2, 1, 1],
        vocab_size=40,
    )
    components = {"transformer": transformer, "vae": wan_vae(), "scheduler": diffusers.UniPCMultistepScheduler()}
    pipe = assemble("Cosmos3OmniPipeline", enable_safety_checker=False, text_tokenizer=Processor(), **components)
    pipe.tokenize_prompt = lambda *_, **__: (list(range(6)), list(range(10, 15)))
    inputs = {"prompt": "a cat", "guidance_scale": 1.0, "enable_safety_check": False}
    sizes = {"height": 32, "width": 32, "num_frames": 5}, {"height": 32, "width": 48, "num_frames": 5}
    return Tiny(pipe, inputs, {"guidance_scale": 4.0}, branches=2, sizes=sizes)


class transforms:
    """What Cosmos' ControlNet needs of torchvision."""

    InterpolationMode = SimpleNamespace(NEAREST=None)

    class functional:
        @staticmethod
        def resize(image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            return nn.functional.interpolate(image, size=list(size))


@builds("Cosmos2_5_TransferPipeline")
def _() -> Tiny:

    controlnet = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        img_context_dim_in=16,
        img_context_dim_out=32,
    )
    transformer = cosmos_transformer(
        17,
        16,
        controlnet_block_every_n=2,
        img_context_dim_in=16,
        img_context_num_tokens=4,
        img_context_dim_out=32,
    )
    tiny = cosmos("Cosmos2_5_TransferPipeline", transformer, unipc(), wan_vae(), {"controlnet": controlnet})
    tiny.patches = {"diffusers.models.controlnets.controlnet_cosmos.transforms": transforms}
    tiny.inputs |= {"controls": clip, "num_frames_per_chunk": 16}
    tiny.sizes = tuple({**size, "num_frames": 3} for size in (SQUARE, WIDE))
    return tiny
