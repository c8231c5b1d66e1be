"""Pipelines that make sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from pipelines.common import Tiny, assemble, builds, flow, guided, normal


def oobleck(channels: int) -> nn.Module:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=channels,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )


@builds("StableAudioPipeline")
def _() -> Tiny:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        num_layers=4,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    from diffusers import StableAudioProjectionModel

    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction")
    components = {"transformer": transformer, "vae": oobleck(3), "scheduler": scheduler, "projection_model": projection}
    tiny = guided("StableAudioPipeline", 16, components, output_type="pt")
    mask = torch.ones(1, 5, dtype=torch.long)
    tiny.inputs["attention_mask"], tiny.guided["negative_attention_mask"] = mask, mask
    tiny.sizes = {"num_waveforms_per_prompt": 1}, {"num_waveforms_per_prompt": 2}  # it has one length
    return tiny


def stable_audio3(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8,
        patch_size=1,
        embed_dim=32,
        depth=4,
        num_heads=4,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
    )
    vae = diffusers.AutoencoderSAME(
        audio_channels=2,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    scheduler = flow(num_train_timesteps=1, shift=1.0)
    components = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    components["duration_embedder"] = StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16)
    tiny = guided(name, 16, components, mask="encoder_attention_mask", **inputs)
    tiny.sizes = {"duration": 2.0}, {"duration": 3.0}
    return tiny


@builds("StableAudio3Pipeline")
def _() -> Tiny:
    return stable_audio3("StableAudio3Pipeline")


def sound(duration: float) -> torch.Tensor:
    return normal(1, 2, int(duration * 16), seed=7)


def without_guidance(tiny: Tiny) -> Tiny:
    del tiny.inputs["guidance_scale"]
    tiny.guided = {}
    return tiny


@builds("StableAudio3AudioToAudioPipeline")
def _() -> Tiny:
    return without_guidance(stable_audio3("StableAudio3AudioToAudioPipeline", audio=sound, init_noise_level=1.0))


@builds("StableAudio3InpaintPipeline")
def _() -> Tiny:
    tiny = stable_audio3("StableAudio3InpaintPipeline", audio=sound, mask_start_seconds=0.5, mask_end_seconds=1.0)
    return without_guidance(tiny)


@builds("LongCatAudioDiTPipeline")
def _() -> Tiny:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=4, dit_heads=2, dit_text_dim=16, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=400,
    )
    pipe = assemble("LongCatAudioDiTPipeline", transformer=transformer, vae=vae)
    pipe.encode_prompt = lambda prompt, device: (normal(1, 5, 16, seed=len(prompt[0])), torch.tensor([5]))
    sizes = {"audio_duration_s": 0.1}, {"audio_duration_s": 0.2}
    return Tiny(pipe, {"prompt": "rain", "guidance_scale": 1.0}, {"guidance_scale": 4.0}, branches=2, sizes=sizes)


@builds("AceStepPipeline")
def _() -> Tiny:
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    parts = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    transformer = diffusers.AceStepTransformer1DModel(
        num_hidden_layers=4, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, **parts
    )
    encoder = AceStepConditionEncoder(
        text_hidden_dim=32,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **parts,
    )
    scheduler = flow(num_train_timesteps=1, shift=1.0)
    components = {"transformer": transformer, "vae": oobleck(8), "scheduler": scheduler, "condition_encoder": encoder}
    pipe = assemble("AceStepPipeline", **components)
    ones = torch.ones(1, 5)
    pipe.encode_prompt = lambda **_: (normal(1, 5, 32), ones, normal(1, 5, 32, seed=1), ones)
    sizes = {"audio_duration": 2.0}, {"audio_duration": 3.0}
    inputs = {"prompt": "rain", "lyrics": "", "guidance_scale": 1.0}
    return Tiny(pipe, inputs, {"guidance_scale": 4.0}, sizes=sizes)
