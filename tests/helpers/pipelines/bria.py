"""Bria and FIBO."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from pipelines.common import Encoder, Tiny, assemble, builds, flow, guided, image_vae, normal, photo, wan_vae
from pipelines.flux import flux2_vae


@builds("BriaPipeline")
def _() -> Tiny:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[0, 4, 4],
    )
    components = {"transformer": transformer, "vae": image_vae(shift_factor=0.0), "scheduler": flow()}
    return guided("BriaPipeline", 16, components)


def bria_fibo(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        text_encoder_dim=8,
        axes_dims_rope=[0, 4, 4],
    )
    pipe = assemble(
        name, transformer=transformer, vae=wan_vae(), scheduler=flow(), text_encoder=Encoder(), tokenizer=None
    )

    def get_prompt_embeds(prompt: list[str], **_: Any) -> Any:
        seed = len(prompt[0])
        mask = torch.tensor([[1.0, 1.0, 1.0, 1.0, float(seed > 0)]])  # an empty prompt is padded
        return normal(1, 5, 16, seed=seed), [normal(1, 5, 8, seed=i) for i in range(6)], mask

    pipe.get_prompt_embeds = get_prompt_embeds
    return Tiny(pipe, {"prompt": "{}", "guidance_scale": 1.0, **inputs}, {"negative_prompt": "", "guidance_scale": 4.0})


@builds("BriaFiboPipeline")
def _() -> Tiny:
    return bria_fibo("BriaFiboPipeline")


@builds("BriaFiboEditPipeline")
def _() -> Tiny:
    tiny = bria_fibo("BriaFiboEditPipeline", image=photo, _auto_resize=False)
    tiny.inputs["prompt"] = '{"edit_instruction": "a cat"}'
    return tiny


@builds("BriaFibo2Pipeline")
def _() -> Tiny:
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(8, 4, 4),
        axes_lens=(64, 64, 64),
    )
    components = {"transformer": transformer, "vae": flux2_vae(4), "scheduler": flow(), "text_encoder": Encoder()}
    tiny = guided("BriaFibo2Pipeline", 32, components, 2, "prompt_embeds_mask")
    tiny.inputs["prompt_embeds"] = normal(1, 2, 5, 32)  # of the layers that text is taken from
    tiny.guided["negative_prompt_embeds"] = normal(1, 2, 5, 32, seed=1)
    return tiny
