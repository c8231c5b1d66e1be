"""Kandinsky 5 and 6, and the priors of Kandinsky and Shap-E."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pipelines.common import (
    SMALL,
    SQUARE,
    Encoder,
    Tiny,
    assemble,
    builds,
    flow,
    guided,
    image_vae,
    normal,
    photo,
    picture,
)
from pipelines.hunyuan import hunyuan_vae


def kandinsky5(name: str, vae: nn.Module, **inputs: Any) -> Tiny:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=4,
        axes_dims=(1, 1, 2),
        visual_cond="image" in inputs,
    )
    pipe = assemble(name, transformer=transformer, vae=vae, scheduler=flow(shift=7.0))
    pipe.resolutions = [(32, 32), (48, 32)]

    def embeddings(prefix: str, seed: int) -> dict[str, Any]:
        return {
            f"{prefix}prompt_embeds_qwen": normal(1, 5, 16, seed=seed),
            f"{prefix}prompt_embeds_clip": normal(1, 16, seed=seed + 1),
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        }

    inputs = {**embeddings("", 0), "guidance_scale": 1.0, **inputs}
    return Tiny(pipe, inputs, {**embeddings("negative_", 2), "guidance_scale": 4.0}, branches=2)


@builds("Kandinsky5T2IPipeline")
def _() -> Tiny:
    return kandinsky5("Kandinsky5T2IPipeline", image_vae(16))


@builds("Kandinsky5I2IPipeline")
def _() -> Tiny:
    return kandinsky5("Kandinsky5I2IPipeline", image_vae(16, 4), image=photo)


@builds("Kandinsky5T2VPipeline")
def _() -> Tiny:
    tiny = kandinsky5("Kandinsky5T2VPipeline", hunyuan_vae(16))
    tiny.sizes = {"height": 32, "width": 32, "num_frames": 5}, {"height": 32, "width": 48, "num_frames": 9}
    return tiny


@builds("Kandinsky5I2VPipeline")
def _() -> Tiny:
    tiny = kandinsky5("Kandinsky5I2VPipeline", hunyuan_vae(16), image=photo)
    tiny.sizes = {"height": 32, "width": 32, "num_frames": 17}, {"height": 32, "width": 48, "num_frames": 17}
    return tiny


def prior(**kwargs: Any) -> nn.Module:
    return diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=4, **kwargs)


def shap_e(name: str, **inputs: Any) -> Tiny:
    model = prior(
        embedding_dim=8,
        num_embeddings=6,
        embedding_proj_dim=16,
        time_embed_dim=32,
        clip_embed_dim=16,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True
    )
    pipe = assemble(name, prior=model, scheduler=scheduler)

    def encode(prompt: Any, device: Any, number: int, guided: bool) -> torch.Tensor:
        embeds = normal(number, 16)
        return torch.cat([torch.zeros_like(embeds), embeds]) if guided else embeds

    pipe._encode_prompt = pipe._encode_image = encode
    sizes = {"num_images_per_prompt": 1}, {"num_images_per_prompt": 2}
    tiny = Tiny(pipe, {"guidance_scale": 1.0, "return_dict": True, **inputs}, {"guidance_scale": 4.0}, sizes=sizes)
    tiny.forwards = lambda steps: 2 * steps - 1  # Heun
    return tiny


@builds("ShapEPipeline")
def _() -> Tiny:
    return shap_e("ShapEPipeline", prompt="a cat")


@builds("ShapEImg2ImgPipeline")
def _() -> Tiny:
    return shap_e("ShapEImg2ImgPipeline", image=photo(**SQUARE))


def kandinsky_prior(name: str, **inputs: Any) -> Tiny:
    model = prior(embedding_dim=16, num_embeddings=5)
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=10.0
    )
    pipe = assemble(name, prior=model, scheduler=scheduler)
    mask = torch.ones(1, 5, dtype=torch.bool)

    def encode_prompt(prompt: Any, device: Any, number: int, guided: bool, negative: Any = None) -> Any:
        embeds, states, masks = normal(number, 16), normal(number, 5, 16, seed=1), mask.expand(number, 5)
        if guided:
            embeds = torch.cat([normal(number, 16, seed=2), embeds])
            states = torch.cat([normal(number, 5, 16, seed=3), states])
            masks = torch.cat([masks, masks])
        return embeds, states, masks

    pipe._encode_prompt = encode_prompt
    pipe.get_zero_embed = lambda *_, **__: torch.zeros(1, 16)
    sizes = {"num_images_per_prompt": 1}, {"num_images_per_prompt": 2}
    return Tiny(
        pipe,
        {"prompt": "a cat", "guidance_scale": 1.0, "output_type": "pt", **inputs},
        {"guidance_scale": 4.0},
        sizes=sizes,
    )


@builds("KandinskyPriorPipeline")
def _() -> Tiny:
    return kandinsky_prior("KandinskyPriorPipeline")


@builds("KandinskyV22PriorPipeline")
def _() -> Tiny:
    return kandinsky_prior("KandinskyV22PriorPipeline")


@builds("KandinskyV22PriorEmb2EmbPipeline")
def _() -> Tiny:
    return kandinsky_prior("KandinskyV22PriorEmb2EmbPipeline", image=normal(1, 16, seed=5), strength=1.0)


class AudioVae(Encoder):
    """Tells how long the audio latents are."""

    config, latent_hop_length = SimpleNamespace(sample_rate=400), 10


@builds("Kandinsky6TI2VAPipeline")
def _() -> Tiny:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=4,
        axes_dims=(2, 2, 4),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    )
    components = {"transformer": transformer, "vae": hunyuan_vae(16), "scheduler": flow(shift=7.0)}
    components |= {"audio_vae": AudioVae(), "vocoder": Encoder()}
    tiny = guided("Kandinsky6TI2VAPipeline", 16, components, 2, pooled=("pooled_prompt_embeds", 16), sample_audio=True)
    tiny.sizes = {**SMALL, "num_frames": 5, "height": 32, "width": 32}, {"height": 32, "width": 48, "num_frames": 5}
    return tiny


class SRVae(Encoder):
    """Scales by 8 in space, by averaging, and not in time."""

    spatial_compression_ratio, temporal_compression_ratio = 8, 4
    config = SimpleNamespace(scaling_factor=1.0)

    def encode(self, video: Tensor, return_dict: bool) -> Any:
        latents = nn.functional.avg_pool3d(video, (1, 8, 8)).repeat(1, 2, 1, 1, 1)[:, :4]
        return (SimpleNamespace(mode=lambda: latents),)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (nn.functional.interpolate(latents[:, :3], scale_factor=(1, 8, 8)),)


@builds("Kandinsky6SRPipeline")
def _() -> Tiny:
    transformer = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_visual_blocks=4,
        axes_dims=(2, 2, 4),
        nabla_window=(1, 1, 1),
        tile_sizes=((64, 64),),
    )
    pipe = assemble("Kandinsky6SRPipeline", transformer=transformer, vae=SRVae(), scheduler=flow())
    one, two = ({"video": picture(32, width).unsqueeze(1)} for width in (32, 64))
    return Tiny(pipe, {"resolution_scale": 2, "output_type": "pt"}, sizes=(one, two))  # tiles, one after the other
