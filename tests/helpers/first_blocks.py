"""Tiny transformers with what their first block's signal must be, worked out again from the block's parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn, randn
from torch.nn import functional as F

BATCH = 2


class Case(NamedTuple):
    """A tiny model of a class, a call, and the signal by hand.

    ``by_hand`` gets the first block, the block's inputs by name, the model, and the call.
    """

    build: Callable[[], nn.Module]
    call: Callable[[], dict[str, Any]]
    by_hand: Callable[..., torch.Tensor]
    block: str = "transformer_blocks.0"


def times(value: float = 0.6) -> torch.Tensor:
    return torch.full((BATCH,), value)


def modulate(states, scale, shift=0.0):
    return states * (1 + scale) + shift


def layer_norm(states, eps=1e-6):
    return F.layer_norm(states, states.shape[-1:], eps=eps)


def rms_norm(states, eps, weight=None):
    return F.rms_norm(states, states.shape[-1:], weight, eps)


def ada_norm_zero(block, inputs, model, call):
    """Of the parts of the norm's projection, the first two shift and scale."""
    hidden_states = inputs["hidden_states"]
    shift, scale = block.norm1.linear(F.silu(inputs["temb"]))[:, None].split(hidden_states.shape[-1], -1)[:2]
    return modulate(layer_norm(hidden_states), scale, shift)


def image_call(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": randn(BATCH, 16, 8),
        "encoder_hidden_states": randn(BATCH, 5, 16),
        "timestep": times(),
        **more,
    }


def ids(axes: int = 3) -> dict[str, torch.Tensor]:
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(16, 2)
    return {"img_ids": F.pad(grid, (1, axes - 3)), "txt_ids": torch.zeros(5, axes)}


SIZES = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2}
PACKED = {"in_channels": 8, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6), **SIZES}
CASES: dict[str, Case] = {}


# Norms that return what they modulated


CASES["FluxTransformer2DModel"] = Case(
    lambda: diffusers.FluxTransformer2DModel(num_single_layers=1, pooled_projection_dim=16, **PACKED),
    lambda: image_call(pooled_projections=randn(BATCH, 16), **ids()),
    ada_norm_zero,
)


def sd3(**more: Any) -> Case:
    return Case(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            **SIZES,
            **more,
        ),
        lambda: image_call(hidden_states=randn(BATCH, 4, 8, 8), pooled_projections=randn(BATCH, 16)),
        ada_norm_zero,
    )


CASES["SD3Transformer2DModel"] = sd3()
CASES["SD3Transformer2DModel, two attentions"] = sd3(dual_attention_layers=(0,))


def chroma(block, inputs, model, call):
    shift, scale = inputs["temb"][:, 0:1], inputs["temb"][:, 1:2]
    return modulate(layer_norm(inputs["hidden_states"]), scale, shift)


CASES["ChromaTransformer2DModel"] = Case(
    lambda: diffusers.ChromaTransformer2DModel(
        num_single_layers=1,
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **PACKED,
    ),
    lambda: image_call(**ids()),
    chroma,
)


def cogview4(block, inputs, model, call):
    shift, _, scale = block.norm1.linear(inputs["temb"])[:, None].chunk(12, -1)[:3]
    return modulate(layer_norm(inputs["hidden_states"], 1e-5), scale, shift)


CASES["CogView4Transformer2DModel"] = Case(
    lambda: diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
        **SIZES,
    ),
    lambda: image_call(
        hidden_states=randn(BATCH, 4, 8, 8),
        original_size=torch.tensor([[64.0, 64.0]] * BATCH),
        target_size=torch.tensor([[64.0, 64.0]] * BATCH),
        crop_coords=torch.zeros(BATCH, 2),
    ),
    cogview4,
)


def hunyuan_video(by_hand: Callable[..., torch.Tensor], **more: Any) -> Case:
    return Case(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=False,
            **SIZES,
            **more,
        ),
        lambda: image_call(
            hidden_states=randn(BATCH, 4, 2, 8, 8),
            encoder_attention_mask=torch.ones(BATCH, 5),
            pooled_projections=randn(BATCH, 16),
        ),
        by_hand,
    )


def token_replace(block, inputs, model, call):
    """The first frame is given, and modulated as of timestep 0."""
    first, rest = inputs["hidden_states"].split([16, 16], 1)
    frames = (first, inputs["token_replace_emb"]), (rest, inputs["temb"])
    return torch.cat([ada_norm_zero(block, {"hidden_states": f, "temb": t}, model, call) for f, t in frames], 1)


CASES["HunyuanVideoTransformer3DModel"] = hunyuan_video(ada_norm_zero)
CASES["HunyuanVideoTransformer3DModel, image to video"] = hunyuan_video(
    token_replace, image_condition_type="token_replace"
)


def mochi(block, inputs, model, call):
    scale = block.norm1.linear(F.silu(inputs["temb"]))[:, None].chunk(4, -1)[0]
    return modulate(rms_norm(inputs["hidden_states"], 1e-6), scale)


CASES["MochiTransformer3DModel"] = Case(
    lambda: diffusers.MochiTransformer3DModel(
        in_channels=4,
        pooled_projection_dim=16,
        text_embed_dim=16,
        time_embed_dim=16,
        **SIZES,
    ),
    lambda: image_call(
        hidden_states=randn(BATCH, 4, 2, 8, 8), encoder_attention_mask=torch.ones(BATCH, 5, dtype=torch.bool)
    ),
    mochi,
)


def lumina2(block, inputs, model, call):
    scale = block.norm1.linear(F.silu(inputs["temb"]))[:, None].chunk(4, -1)[0]
    return modulate(rms_norm(inputs["hidden_states"], 1e-5, block.norm1.norm.weight), scale)


CASES["Lumina2Transformer2DModel"] = Case(
    lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    ),
    lambda: image_call(hidden_states=randn(BATCH, 4, 8, 8), encoder_attention_mask=torch.ones(BATCH, 5).bool()),
    lumina2,
    block="layers.0",
)


# Blocks that modulate by themselves


def qwen(block, inputs, model, call):
    shift, scale = block.img_mod(inputs["temb"])[:, None].chunk(6, -1)[:2]
    return modulate(layer_norm(inputs["hidden_states"]), scale, shift)


CASES["QwenImageTransformer2DModel"] = Case(
    lambda: diffusers.QwenImageTransformer2DModel(**PACKED),
    lambda: image_call(
        encoder_hidden_states_mask=torch.ones(BATCH, 5, dtype=torch.bool), img_shapes=[[(1, 4, 4)]] * BATCH
    ),
    qwen,
)


def flux2(block, inputs, model, call):
    shift, scale = inputs["temb_mod_img"].chunk(6, -1)[:2]
    return modulate(layer_norm(inputs["hidden_states"]), *(m.reshape(-1, 1, m.shape[-1]) for m in (scale, shift)))


CASES["Flux2Transformer2DModel"] = Case(
    lambda: diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_single_layers=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **SIZES,
    ),
    lambda: image_call(**ids(axes=4)),
    flux2,
)


def ltx(block, inputs, model, call):
    parts = block.scale_shift_table + inputs["temb"].reshape(BATCH, -1, 6, 32)
    return modulate(rms_norm(inputs["hidden_states"], 1e-6), parts[:, :, 1], parts[:, :, 0])


CASES["LTXVideoTransformer3DModel"] = Case(
    lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=16, **SIZES
    ),
    lambda: image_call(encoder_attention_mask=torch.ones(BATCH, 5), num_frames=1, height=4, width=4),
    ltx,
)


def z_image(block, inputs, model, call):
    scale = block.adaLN_modulation(inputs["adaln_input"])[:, None].chunk(4, -1)[0]
    return modulate(rms_norm(inputs["x"], 1e-5, block.attention_norm1.weight), scale)


def build_z_image() -> nn.Module:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )
    nn.init.normal_(model.x_pad_token)  # left as they are in memory
    nn.init.normal_(model.cap_pad_token)
    return model


CASES["ZImageTransformer2DModel"] = Case(
    build_z_image,
    lambda: {"x": [randn(4, 1, 8, 8)] * BATCH, "t": times(), "cap_feats": [randn(5, 16)] * BATCH},
    z_image,
    block="layers.0",
)


# Embeddings of the timestep


def sinusoid(timestep: torch.Tensor, size: int) -> torch.Tensor:
    angles = timestep[:, None] * torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(size // 2) / (size // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def mlp(embedder: nn.Module, embedded: torch.Tensor) -> torch.Tensor:
    return embedder.linear_2(F.silu(embedder.linear_1(embedded)))


def wan(block, inputs, model, call):
    return mlp(model.condition_embedder.time_embedder, sinusoid(call["timestep"], 32))


CASES["WanTransformer3DModel"] = Case(
    lambda: diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        num_attention_heads=2,
        attention_head_dim=12,
    ),
    lambda: image_call(hidden_states=randn(BATCH, 4, 2, 8, 8), timestep=times(600.0)),
    wan,
    block="blocks.0",
)


def cogvideox(block, inputs, model, call):
    embedding = mlp(model.time_embedding, sinusoid(call["timestep"], 32))
    if model.config.get("ofs_embed_dim") is not None:
        embedding = embedding + mlp(model.ofs_embedding, sinusoid(call["ofs"], 16))
    return embedding


COGVIDEOX = {
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 5,
    **SIZES,
}


def cogvideox_case(build: Callable[..., nn.Module], **call: Any) -> Case:
    return Case(
        lambda: build(**COGVIDEOX),
        lambda: image_call(hidden_states=randn(BATCH, 2, 4, 8, 8), timestep=times(600.0), **call),
        cogvideox,
    )


CASES["CogVideoXTransformer3DModel"] = cogvideox_case(diffusers.CogVideoXTransformer3DModel)
CASES["CogVideoXTransformer3DModel, with ofs"] = cogvideox_case(
    partial(diffusers.CogVideoXTransformer3DModel, ofs_embed_dim=16), ofs=torch.full((1,), 2.0)
)
CASES["ConsisIDTransformer3DModel"] = cogvideox_case(diffusers.ConsisIDTransformer3DModel)

CASES["HiDreamImageTransformer2DModel"] = Case(
    lambda: diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_single_layers=1,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(4, 4),
        llama_layers=[0, 0],
        force_inference_output=True,
        **SIZES,
    ),
    lambda: {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "timesteps": times(600.0),
        "encoder_hidden_states_t5": randn(BATCH, 5, 16),
        "encoder_hidden_states_llama3": randn(1, BATCH, 5, 16),
        "pooled_embeds": randn(BATCH, 16),
    },
    lambda block, inputs, model, call: mlp(model.t_embedder.timestep_embedder, sinusoid(call["timesteps"], 256)),
    block="double_stream_blocks.0",
)
