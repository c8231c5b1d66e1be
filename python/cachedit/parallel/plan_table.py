"""How the models are split that diffusers has no plan for, or one that does not do for pieces of any length."""

from __future__ import annotations

from typing import Any

from .plan_entries import ContextPlan, In, Out, Tokens

__all__ = ["PLANS", "UNSPLIT"]

TOKENS = In(1)  # [batch, tokens, ...]
GATHERED = Out(1)
ROPE = {0: In(0), 1: In(0)}  # outputs of a module: tables [tokens, ...] of cosines and sines
RESIDUALS = In(1, 3)  # of a ControlNet

# Models that get image and text as sequences, and have positions as lists of ids.
FLUX_INPUTS = {
    "hidden_states": TOKENS,
    "encoder_hidden_states": TOKENS,
    "img_ids": In(-2, stream=False),
    "txt_ids": In(-2, stream=False),
}
BLOCK_INPUTS = {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS}
FLUX_JOINED = (".encoder_hidden_states", ".hidden_states")


# Image and text are split on their way into the first block, and the image is gathered after the last layer.
FROM_FIRST_BLOCK: dict[str, Any] = {"transformer_blocks.0": BLOCK_INPUTS, "proj_out": GATHERED}


FIRST_BLOCK = ("transformer_blocks.0.hidden_states", "transformer_blocks.0.encoder_hidden_states")

PLANS: dict[str, ContextPlan] = {
    "FluxTransformer2DModel": ContextPlan(
        {
            "": {**FLUX_INPUTS, "controlnet_block_samples": RESIDUALS, "controlnet_single_block_samples": RESIDUALS},
            "proj_out": GATHERED,
        }
    ),
    "ChromaTransformer2DModel": ContextPlan(
        {
            "": {**FLUX_INPUTS, "controlnet_block_samples": RESIDUALS, "controlnet_single_block_samples": RESIDUALS},
            "proj_out": GATHERED,
        },
        joined=FLUX_JOINED,
    ),
    "BriaTransformer2DModel": ContextPlan(
        {
            "": {**FLUX_INPUTS, "controlnet_block_samples": RESIDUALS, "controlnet_single_block_samples": RESIDUALS},
            "proj_out": GATHERED,
        }
    ),
    "BriaFiboTransformer2DModel": ContextPlan(
        {"": {**FLUX_INPUTS, "text_encoder_layers": TOKENS}, "proj_out": GATHERED}, joined=FLUX_JOINED
    ),
    "OvisImageTransformer2DModel": ContextPlan({"": FLUX_INPUTS, "proj_out": GATHERED}),
    "LongCatImageTransformer2DModel": ContextPlan({"": FLUX_INPUTS, "proj_out": GATHERED}),
    "QwenImageTransformer2DModel": ContextPlan(
        {
            "": {"controlnet_block_samples": RESIDUALS},
            **FROM_FIRST_BLOCK,
            "transformer_blocks.*": {"encoder_hidden_states_mask": In(1, 2), "modulate_index": In(1, 2)},
            "pos_embed": ROPE,
        }
    ),
    "QwenImageControlNetModel": ContextPlan(
        {
            "transformer_blocks.0": BLOCK_INPUTS,
            "transformer_blocks.*": {"encoder_hidden_states_mask": In(1, 2)},
            "pos_embed": ROPE,
            "controlnet_blocks.*": GATHERED,
        }
    ),
    "ZImageTransformer2DModel": ContextPlan(
        {
            "": {"controlnet_block_samples": RESIDUALS},
            "layers.0": {"x": TOKENS},
            "layers.*": {"freqs_cis": TOKENS, "noise_mask": In(1, 2)},
            "all_final_layer.*": {"noise_mask": In(1, 2), 0: GATHERED},
        },
        attention=("layers",),
    ),
    # What a layer gives for the next one, it gives for the transformer too: it is gathered each time.
    "ZImageControlNetModel": ContextPlan(
        {"control_layers.*": {"c": In(-2), "x": In(1, stream=False), "freqs_cis": In(1, stream=False), 0: Out(-2)}},
        attention=("control_layers",),
    ),
    # Skip-layer guidance leaves blocks out: pieces begin before them.
    "SD3Transformer2DModel": ContextPlan(
        {
            "": {"block_controlnet_hidden_states": RESIDUALS},
            "pos_embed": {0: In(1, stream=True)},
            "context_embedder": {0: In(1, stream=True)},
            "proj_out": GATHERED,
        },
        attention=("transformer_blocks",),
    ),
    "PixArtTransformer2DModel": ContextPlan(
        {"transformer_blocks.0": {"hidden_states": TOKENS}, "proj_out": GATHERED},
        attention=("transformer_blocks.*.attn1",),
    ),
    "CogView3PlusTransformer2DModel": ContextPlan(FROM_FIRST_BLOCK),
    "CogView4Transformer2DModel": ContextPlan({"rope": ROPE, **FROM_FIRST_BLOCK}),
    "GlmImageTransformer2DModel": ContextPlan({"rope": ROPE, **FROM_FIRST_BLOCK}),
    "CogVideoXTransformer3DModel": ContextPlan({"": {"image_rotary_emb": In(0, 2)}, **FROM_FIRST_BLOCK}),
    "ConsisIDTransformer3DModel": ContextPlan(
        {
            "": {"image_rotary_emb": In(0, 2)},
            "transformer_blocks.0": BLOCK_INPUTS,
            "norm_final": {
                "input": Out(1, joined=True)
            },  # of both streams, which the model then tells apart by the text's length
        },
        joined=FIRST_BLOCK[::-1],
    ),
    "HunyuanImageTransformer2DModel": ContextPlan({"rope": ROPE, **FROM_FIRST_BLOCK}, joined=FIRST_BLOCK),
    "HunyuanVideoTransformer3DModel": ContextPlan(
        {
            "rope": ROPE,
            **FROM_FIRST_BLOCK,
            "transformer_blocks.*": {"num_tokens": Tokens(FIRST_BLOCK[0])},
            "single_transformer_blocks.*": {"num_tokens": Tokens(FIRST_BLOCK[0])},
        },
        joined=FIRST_BLOCK,
    ),
    "HunyuanVideo15Transformer3DModel": ContextPlan(
        {"rope": ROPE, **FROM_FIRST_BLOCK, "transformer_blocks.*": {"attention_mask": In(1, 2)}}
    ),
    # The last tokens are taken after the last block, by their number: each block is given all, and gives all.
    "HunyuanVideoFramepackTransformer3DModel": ContextPlan(
        {
            "transformer_blocks.*": {**BLOCK_INPUTS, "freqs_cis": In(0, 2), 0: GATHERED, 1: GATHERED},
            "single_transformer_blocks.*": {
                "hidden_states": In(1, stream=False),
                "encoder_hidden_states": In(1, stream=False),
                "image_rotary_emb": In(0, 2),
                0: GATHERED,
                1: GATHERED,
            },
        },
        attention=("transformer_blocks", "single_transformer_blocks"),
        joined=("transformer_blocks.*.hidden_states", "transformer_blocks.*.encoder_hidden_states"),
    ),
    # Each block's text is joined with that of a layer of the text encoder, which is cut off after it.
    "HiDreamImageTransformer2DModel": ContextPlan(
        {
            "double_stream_blocks.*": {
                **BLOCK_INPUTS,
                "hidden_states_masks": In(1, 2),
                "image_rotary_emb": In(1, joined=True),
                0: GATHERED,
                1: GATHERED,
            },
            "single_stream_blocks.*": {
                "hidden_states": TOKENS,
                "hidden_states_masks": In(1, 2),
                "image_rotary_emb": In(1, stream=False),
                0: GATHERED,
            },
        },
        attention=("double_stream_blocks", "single_stream_blocks"),
        joined=("double_stream_blocks.*.hidden_states", "double_stream_blocks.*.encoder_hidden_states"),
    ),
    "MochiTransformer3DModel": ContextPlan(
        {
            "transformer_blocks.0": BLOCK_INPUTS,
            "transformer_blocks.*": {"encoder_attention_mask": In(1, 2, valid=True), "image_rotary_emb": In(0, 3)},
            "proj_out": GATHERED,
        }
    ),
    "WanVACETransformer3DModel": ContextPlan(
        {
            "rope": {0: TOKENS, 1: TOKENS},
            "vace_blocks.0": {"control_hidden_states": TOKENS},
            "vace_blocks.*": {"hidden_states": In(1, stream=False)},
            "blocks.0": {"hidden_states": In(1, stream=False)},
            "proj_out": GATHERED,
        },
        attention=("blocks.*.attn1", "vace_blocks.*.attn1"),
    ),
    # Faces are attended to frame by frame, by all tokens of the frame.
    "WanAnimateTransformer3DModel": ContextPlan(
        {
            "rope": {0: TOKENS, 1: TOKENS},
            "blocks.0": {"hidden_states": TOKENS},
            "face_adapter.*": {"hidden_states": GATHERED, 0: TOKENS},
            "proj_out": GATHERED,
        },
        attention=("blocks.*.attn1",),
    ),
    "SkyReelsV2Transformer3DModel": ContextPlan(
        {
            "rope": {0: TOKENS, 1: TOKENS},
            "blocks.0": {"hidden_states": TOKENS},
            "blocks.*": {"temb": In(2, 4)},  # of each token, in diffusion forcing
            "norm_out": GATHERED,  # before it is shifted and scaled, token by token
        },
        attention=("blocks.*.attn1",),
    ),
    # The sequence becomes frames again right after the last block: each block is given all, and gives all.
    "Kandinsky5Transformer3DModel": ContextPlan(
        {"visual_transformer_blocks.*": {"visual_embed": TOKENS, "rope": In(1, stream=False), 0: GATHERED}},
        attention=("visual_transformer_blocks.*.self_attention",),
    ),
    "ErnieImageTransformer2DModel": ContextPlan(
        {
            "layers.0": {"x": In(0)},
            "layers.*": {"rotary_pos_emb": In(1, stream=False), "temb": In(0)},
            "final_linear": Out(0),
        }
    ),
    "Lumina2Transformer2DModel": ContextPlan(
        {"layers.0": {"hidden_states": TOKENS}, "layers.*": {"image_rotary_emb": TOKENS}, "norm_out": GATHERED},
        attention=("layers",),
    ),
    "LTXVideoTransformer3DModel": ContextPlan(
        {
            "": {"hidden_states": TOKENS, "timestep": In(1, 2)},
            "rope": {0: TOKENS, 1: TOKENS},
            "proj_out": GATHERED,
        },
        attention=("transformer_blocks.*.attn1",),
    ),
    "LTX2VideoTransformer3DModel": ContextPlan(
        {
            "": {
                "hidden_states": TOKENS,
                "audio_hidden_states": TOKENS,
                "timestep": In(1, 2),
                "audio_timestep": In(1, 2),
                "video_keyframes_mask": In(1, stream=False),
            },
            **{
                rope: {0: In(-2), 1: In(-2)}
                for rope in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
            },
            "proj_out": GATHERED,
            "audio_proj_out": GATHERED,
        },
        attention=tuple(
            f"transformer_blocks.*.{name}"
            for name in ("attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn")
        ),
    ),
    "HeliosTransformer3DModel": ContextPlan(
        {
            "blocks.0": {"hidden_states": TOKENS},
            "blocks.*": {
                "rotary_emb": In(1, stream=False),
                "temb": In(1, 4),
                "original_context_length": Tokens("blocks.0.hidden_states", last=True),
            },
            "norm_out": {"hidden_states": GATHERED},
        },
        attention=("blocks.*.attn1",),
    ),
}

# Classes whose attention cannot be split over the sequence, and why.
UNSPLIT: dict[str, str] = {
    "SanaTransformer2DModel": "its convolutions run over neighbouring tokens",
    "SanaVideoTransformer3DModel": "its convolutions run over neighbouring tokens",
}
