"""Z-Image, Lumina and OmniGen."""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import torch
from torch import nn

from pipelines.common import Tiny, assemble, builds, control, flow, guided, image_vae, left_half, normal, picture


@builds("LuminaPipeline")
def _() -> Tiny:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        hidden_size=16,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=16,
    )
    components = {"transformer": transformer, "vae": image_vae(4, 4), "scheduler": flow()}
    tiny = guided("LuminaPipeline", 16, components, mask="prompt_attention_mask")
    tiny.sizes = {"height": 128, "width": 128}, {"height": 128, "width": 160}
    return tiny


@builds("Lumina2Pipeline")
def _() -> Tiny:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=16,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=16,
    )
    components = {"transformer": transformer, "vae": image_vae(shift_factor=0.1), "scheduler": flow()}
    tiny = guided("Lumina2Pipeline", 16, components, 2, "prompt_attention_mask")
    return tiny


def z_image(name: str, components: Any = (), **inputs: Any) -> Tiny:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    components = {
        "transformer": transformer,
        "vae": image_vae(16, shift_factor=0.1),
        "scheduler": flow(),
        **dict(components),
    }
    tiny = guided(name, 16, components, **inputs)
    tiny.inputs |= {"prompt_embeds": [normal(5, 16)], "guidance_scale": 0.0}
    tiny.guided["negative_prompt_embeds"] = [normal(6, 16, seed=1)]
    return tiny


def z_controlnet(channels: int) -> dict[str, nn.Module]:
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    return {"controlnet": controlnet}


@builds("ZImagePipeline")
def _() -> Tiny:
    return z_image("ZImagePipeline")


@builds("ZImageImg2ImgPipeline")
def _() -> Tiny:
    return z_image("ZImageImg2ImgPipeline", image=picture, strength=1.0)


@builds("ZImageInpaintPipeline")
def _() -> Tiny:
    return z_image("ZImageInpaintPipeline", image=picture, mask_image=left_half, strength=1.0)


@builds("ZImageControlNetPipeline")
def _() -> Tiny:
    return z_image("ZImageControlNetPipeline", z_controlnet(16), control_image=control)


@builds("ZImageControlNetInpaintPipeline")
def _() -> Tiny:
    tiny = z_image("ZImageControlNetInpaintPipeline", z_controlnet(33), control_image=control)
    tiny.inputs |= {"image": picture, "mask_image": left_half}
    return tiny


@builds("ZImageOmniPipeline")
def _() -> Tiny:
    tiny = z_image("ZImageOmniPipeline")  # a prompt is a list: what stands before, between and after its images
    tiny.inputs["prompt_embeds"] = [tiny.inputs["prompt_embeds"]]
    tiny.guided["negative_prompt_embeds"] = [tiny.guided["negative_prompt_embeds"]]
    return tiny


@builds("OmniGenPipeline")
def _() -> Tiny:
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=4,
        time_step_dim=4,
        vocab_size=40,
        pad_token_id=0,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )
    components = {
        "transformer": transformer,
        "vae": image_vae(),
        "scheduler": flow(invert_sigmas=True, num_train_timesteps=1),
    }
    with mock.patch("diffusers.pipelines.omnigen.pipeline_omnigen.OmniGenMultiModalProcessor", create=True):
        pipe = assemble("OmniGenPipeline", **components)

    def process(prompt: Any, images: Any, height: int, width: int, **_: Any) -> dict[str, Any]:
        tokens = 5 + 1 + height * width // 16  # text, timestep, image
        return {
            "input_ids": torch.arange(10).view(2, 5),
            "attention_mask": torch.ones(2, tokens, tokens),
            "position_ids": torch.arange(tokens).expand(2, tokens),
            "input_pixel_values": [],
            "input_image_sizes": {},
        }

    class Processor:
        max_image_size = 1024
        __call__ = staticmethod(process)

    pipe.multimodal_processor = Processor()
    return Tiny(pipe, {"prompt": "a cat", "guidance_scale": 4.0})
