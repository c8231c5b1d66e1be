"""Other pipelines that make images."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from pipelines.common import (
    SQUARE,
    WIDE,
    Encoder,
    Tiny,
    assemble,
    builds,
    flow,
    guided,
    image_vae,
    left_half,
    normal,
    photo,
    picture,
    wan_vae,
)
from pipelines.flux import flux2_vae
from pipelines.qwen import qwen_vae


@builds("AuraFlowPipeline")
def _() -> Tiny:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=3,
        num_single_dit_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
    )
    components = {"transformer": transformer, "vae": image_vae(), "scheduler": flow()}
    return guided("AuraFlowPipeline", 16, components, mask="prompt_attention_mask")


@builds("DiTPipeline")
def _() -> Tiny:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    pipe = assemble("DiTPipeline", transformer=transformer, vae=image_vae(), scheduler=diffusers.DDIMScheduler())
    batches = {"class_labels": [1]}, {"class_labels": [1, 2]}  # it has one resolution
    return Tiny(pipe, {"output_type": "np", "guidance_scale": 1.0}, {"guidance_scale": 4.0}, sizes=batches)


@builds("ErnieImagePipeline")
def _() -> Tiny:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=4,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    components = {"transformer": transformer, "vae": image_vae(4, 3), "scheduler": flow()}
    tiny = guided("ErnieImagePipeline", 16, components)
    return tiny


@builds("GlmImagePipeline")
def _() -> Tiny:
    transformer = diffusers.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=16,
    )
    vae = image_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(use_dynamic_shifting=True)}
    tiny = guided("GlmImagePipeline", 16, components, 2)
    tiny.inputs["prior_token_ids"] = lambda height, width: torch.arange(height * width // 16).remainder(16)[None]
    return tiny


@builds("HiDreamImagePipeline")
def _() -> Tiny:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1, 0, 1, 0, 1),
    )
    pipe = assemble("HiDreamImagePipeline", transformer=transformer, vae=image_vae(), scheduler=flow())
    pipe.default_sample_size = 16  # it scales to this area

    def embeddings(prefix: str, seed: int) -> dict[str, Any]:
        return {
            f"{prefix}prompt_embeds_t5": normal(1, 5, 16, seed=seed),
            f"{prefix}prompt_embeds_llama3": normal(2, 1, 5, 16, seed=seed + 1),
            f"{prefix}pooled_prompt_embeds": normal(1, 16, seed=seed + 2),
        }

    inputs = {**embeddings("", 0), "guidance_scale": 1.0}
    return Tiny(pipe, inputs, {**embeddings("negative_", 3), "guidance_scale": 4.0})


@builds("Ideogram4Pipeline")
def _() -> Tiny:
    def transformer() -> nn.Module:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=8,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16,
            mrope_section=(4, 2, 2),
        )

    components = {"transformer": transformer(), "unconditional_transformer": transformer(), "vae": flux2_vae()}
    pipe = assemble("Ideogram4Pipeline", scheduler=flow(), **components)

    def encode_prompt(prompt: str, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        layout = pipe._prepare_ids([max_sequence_length], grid_h, grid_w, max_sequence_length, device)
        text = torch.cat([normal(1, max_sequence_length, 16), torch.zeros(1, grid_h * grid_w, 16)], dim=1)
        return text, *layout

    pipe.encode_prompt = encode_prompt
    return Tiny(pipe, {"prompt": "a cat", "max_sequence_length": 5, "guidance_scale": 4.0, "guidance_schedule": None})


def joy_image(cls: str, name: str, **inputs: Any) -> Tiny:
    transformer = getattr(diffusers, cls)(
        patch_size=[1, 2, 2],
        in_channels=16,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=4,
        rope_dim_list=[4, 6, 6],
    )
    components = {"transformer": transformer, "vae": wan_vae(), "scheduler": flow(), "text_encoder": Encoder()}
    tiny = guided(name, 16, components, 1, "prompt_embeds_mask", **inputs)
    near = {"diffusers.pipelines.joyimage.image_processor.find_best_bucket": lambda h, w, base: (32, round(32 * w / h))}
    tiny.patches = near  # instead of about a megapixel
    return tiny


@builds("JoyImageEditPipeline")
def _() -> Tiny:
    tiny = joy_image("JoyImageEditTransformer3DModel", "JoyImageEditPipeline", image=photo)
    tiny.branches = 2
    return tiny


@builds("JoyImageEditPlusPipeline")
def _() -> Tiny:
    tiny = joy_image("JoyImageEditPlusTransformer3DModel", "JoyImageEditPlusPipeline")
    tiny.guided = {"guidance_scale": 4.0}
    tiny.inputs = {
        "images": lambda **size: [[photo(**size), photo(**size)]],
        "prompt": "a cat",
        "negative_prompt": "",
        "guidance_scale": 1.0,
    }

    def encode_prompt(prompt: list[str], **_: Any) -> Any:
        return normal(1, 5, 16, seed=len(prompt[0])), torch.ones(1, 5, dtype=torch.long)

    tiny.pipe.encode_prompt_multiple_images = encode_prompt
    return tiny


def longcat_image(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 6, 6],
    )
    components = {
        "transformer": transformer,
        "vae": image_vae(16, shift_factor=0.1),
        "scheduler": flow(use_dynamic_shifting=True),
    }
    components |= {"text_processor": Encoder()} if "Edit" in name else {}
    tiny = guided(name, 16, components, 2, **inputs)

    def encode_prompt(prompt_embeds: Any, **_: Any) -> Any:  # its own takes no embeddings without a prompt
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(1.0))
        return prompt_embeds, ids

    tiny.pipe.encode_prompt = encode_prompt
    return tiny


@builds("LongCatImagePipeline")
def _() -> Tiny:
    return longcat_image("LongCatImagePipeline", enable_prompt_rewrite=False)


@builds("LongCatImageEditPipeline")
def _() -> Tiny:
    tiny = longcat_image("LongCatImageEditPipeline")
    tiny.sizes = {"image": photo(**SQUARE)}, {"image": photo(**WIDE)}
    name = "diffusers.pipelines.longcat_image.pipeline_longcat_image_edit.calculate_dimensions"
    tiny.patches = {name: lambda area, ratio: (round(32 * ratio), 32)}
    return tiny


@builds("NucleusMoEImagePipeline")
def _() -> Tiny:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        num_experts=4,
        moe_intermediate_dim=16,
        dense_moe_strategy="leave_first_block_dense",
        capacity_factors=[2.0] * 4,
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):  # left empty
            nn.init.normal_(parameter, std=0.1)
    components = {"transformer": transformer, "vae": qwen_vae(), "scheduler": flow(use_dynamic_shifting=True)}
    return guided("NucleusMoEImagePipeline", 16, components, 2, "prompt_embeds_mask")


@builds("OvisImagePipeline")
def _() -> Tiny:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    components = {"transformer": transformer, "vae": image_vae(shift_factor=0.1), "scheduler": flow()}
    return guided("OvisImagePipeline", 16, components, 2, negative_prompt=None)


def prx_transformer(**kwargs: Any) -> nn.Module:
    return diffusers.PRXTransformer2DModel(
        context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=4, axes_dim=[4, 4], **kwargs
    )


@builds("PRXPipeline")
def _() -> Tiny:
    components = {"transformer": prx_transformer(in_channels=4), "vae": image_vae(), "scheduler": flow()}
    return guided("PRXPipeline", 16, components, mask="prompt_attention_mask", use_resolution_binning=False)


@builds("PRXPixelPipeline")
def _() -> Tiny:
    transformer = prx_transformer(in_channels=3, patch_size=4, bottleneck_size=8, resolution_embeds=True)
    components = {"transformer": transformer, "scheduler": flow()}
    tiny = guided("PRXPixelPipeline", 16, components, mask="prompt_attention_mask", use_resolution_binning=False)
    tiny.inputs["output_type"] = "pt"
    return tiny


def amused(name: str, **inputs: Any) -> Tiny:
    transformer = diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=16,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        vocab_size=33,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=4,
        num_attention_heads=1,
        intermediate_size=16,
        sample_size=16,
    )
    for weight in (transformer.mlm_layer.conv2.weight, *transformer.transformer_layers.parameters()):
        weight.data.mul_(3.0)  # so that the tokens that are drawn depend on the blocks
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=8,
        norm_num_groups=4,
        num_vq_embeddings=32,
        lookup_from_codebook=True,
    )
    scheduler = diffusers.AmusedScheduler(mask_token_id=32)
    pipe = assemble(name, transformer=transformer, vqvae=vqvae, scheduler=scheduler)

    def embeddings(prefix: str, seed: int) -> dict[str, torch.Tensor]:
        states = {f"{prefix}encoder_hidden_states": normal(1, 5, 16, seed=seed + 1)}
        return {f"{prefix}prompt_embeds": normal(1, 16, seed=seed), **states}

    inputs = {**embeddings("", 0), "guidance_scale": 1.0, **inputs}
    guided_inputs = {**embeddings("negative_", 2), "guidance_scale": 4.0}
    sizes = (SQUARE, WIDE) if name == "AmusedPipeline" else tuple({"image": picture(**size)} for size in (SQUARE, WIDE))
    return Tiny(pipe, inputs, guided_inputs, sizes=sizes)


@builds("AmusedPipeline")
def _() -> Tiny:
    return amused("AmusedPipeline")


@builds("AmusedImg2ImgPipeline")
def _() -> Tiny:
    tiny = amused("AmusedImg2ImgPipeline", strength=0.5)  # at 1.0 it hardly draws
    tiny.forwards = lambda steps: steps // 2
    return tiny


@builds("AmusedInpaintPipeline")
def _() -> Tiny:
    tiny = amused("AmusedInpaintPipeline", strength=1.0)
    tiny.sizes = tuple({"image": picture(**size), "mask_image": left_half(**size)} for size in (SQUARE, WIDE))
    return tiny
