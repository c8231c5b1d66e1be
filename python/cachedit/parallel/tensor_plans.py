"""Tensor-parallel plans, per class of transformers and text encoders: which modules are sharded, and as what.

Classes with a plan of diffusers' own (FLUX, FLUX.2, Qwen-Image) have no row here. Patterns are those of diffusers'
plans, ``*`` is any index of a list; a module that a block does not have is passed over. Kinds, in place of a style per
linear layer:

- ``attention``: queries, keys and values by heads, the output projection by its inputs;
- ``feed_forward``: the hidden layer's width;
- ``single``: a block whose output projection takes attention's output and the hidden layer side by side.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ENCODER_PLANS", "ENCODER_SHARES", "KINDS", "PLANS", "SHARES", "TensorPlan"]

# The linear layers of each kind, by every name that diffusers' blocks have for them: those that are split by their
# outputs, then those that are split by their inputs.
KINDS = {
    "attention": (
        (
            *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_gate_logits"),
            *("to_query", "to_key", "to_value"),
        ),
        ("to_out.0", "to_add_out", "out_layer"),
    ),
    "feed_forward": (
        ("net.0.proj", "in_layer", "w1", "w3", "gate_proj", "up_proj"),
        ("net.2", "out_layer", "w2", "linear_fc2"),
    ),
    "single": (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("proj_out",)),
}

# What modules call numbers that are a rank's share once they are sharded.
SHARES = ("heads", "num_heads", "mlp_hidden_dim")

Names = tuple[str, ...]


class TensorPlan(NamedTuple):
    """One transformer class.

    Args:
        modules: Pattern of module names, and their kind.
        rotary: Arguments of attention modules that differ by head, as tensors or tuples of them, and which dimension
            of a tensor with so many dimensions holds the heads.
    """

    modules: dict[str, str]
    rotary: dict[str, dict[int, int]] = {}  # noqa: RUF012 - a default, never written


def _blocks(
    name: str, attention: tuple[str, ...] = ("attn",), feed_forward: tuple[str, ...] = ("ff",)
) -> dict[str, str]:
    kinds = {"attention": attention, "feed_forward": feed_forward}
    return {f"{name}.*.{module}": kind for kind, modules in kinds.items() for module in modules}


_TWO_STREAMS = _blocks("transformer_blocks", feed_forward=("ff", "ff_context"))
_FLUX_LIKE = TensorPlan({**_TWO_STREAMS, "single_transformer_blocks.*": "single"})
_ONE_ATTENTION = TensorPlan(_blocks("transformer_blocks", ("attn1",)))
_WAN_BLOCKS = _blocks("blocks", ("attn1", "attn2"), ("ffn",))
_WAN = TensorPlan(_WAN_BLOCKS)

IMAGE = {
    "ChromaTransformer2DModel": _FLUX_LIKE,
    "CogView3PlusTransformer2DModel": _ONE_ATTENTION,
    "CogView4Transformer2DModel": _ONE_ATTENTION,
    "ErnieImageTransformer2DModel": TensorPlan(_blocks("layers", ("self_attention",), ("mlp",))),
    "GlmImageTransformer2DModel": _ONE_ATTENTION,
    "HunyuanImageTransformer2DModel": _FLUX_LIKE,
    "LongCatImageTransformer2DModel": _FLUX_LIKE,
    "OvisImageTransformer2DModel": _FLUX_LIKE,
    "PixArtTransformer2DModel": TensorPlan(_blocks("transformer_blocks", ("attn1", "attn2"))),
    "SD3Transformer2DModel": TensorPlan(_blocks("transformer_blocks", ("attn", "attn2"), ("ff", "ff_context"))),
    "ZImageTransformer2DModel": TensorPlan(
        _blocks("noise_refiner", ("attention",), ("feed_forward",))
        | _blocks("context_refiner", ("attention",), ("feed_forward",))
        | _blocks("layers", ("attention",), ("feed_forward",))
    ),
}

VIDEO = {
    "ChronoEditTransformer3DModel": _WAN,
    "CogVideoXTransformer3DModel": _ONE_ATTENTION,
    "ConsisIDTransformer3DModel": _ONE_ATTENTION,
    "HunyuanVideo15Transformer3DModel": TensorPlan(_TWO_STREAMS),
    "HunyuanVideoFramepackTransformer3DModel": _FLUX_LIKE,
    "HunyuanVideoTransformer3DModel": _FLUX_LIKE,
    "Kandinsky5Transformer3DModel": TensorPlan(
        _blocks("text_transformer_blocks", ("self_attention",), ("feed_forward",))
        | _blocks("visual_transformer_blocks", ("self_attention", "cross_attention"), ("feed_forward",))
    ),
    # Their embeddings come for all heads: (batch, tokens, heads * width), or (batch, heads, tokens, width).
    "LTXVideoTransformer3DModel": TensorPlan(
        _blocks("transformer_blocks", ("attn1", "attn2")), {"image_rotary_emb": {3: 2}}
    ),
    "LTX2VideoTransformer3DModel": TensorPlan(
        _blocks(
            "transformer_blocks",
            ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
            ("ff", "audio_ff"),
        ),
        {"query_rotary_emb": {3: 2, 4: 1}, "key_rotary_emb": {3: 2, 4: 1}},
    ),
    # Its frequencies are learnt for each head: (tokens, heads, width).
    "MochiTransformer3DModel": TensorPlan(
        _blocks("transformer_blocks", ("attn1",), ("ff", "ff_context")), {"image_rotary_emb": {3: 1}}
    ),
    "SkyReelsV2Transformer3DModel": _WAN,
    "WanAnimateTransformer3DModel": _WAN,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": TensorPlan(_WAN_BLOCKS | _blocks("vace_blocks", ("attn1", "attn2"), ("ffn",))),
}

PLANS: dict[str, TensorPlan] = IMAGE | VIDEO


# Text encoders that transformers has no plan for, in its format.
_T5_LAYER = "encoder.block.*.layer"
_T5 = {
    "shared": "embedding_rowwise",
    "encoder.embed_tokens": "embedding_rowwise",
    f"{_T5_LAYER}.0.SelfAttention.q": "colwise",
    f"{_T5_LAYER}.0.SelfAttention.k": "colwise",
    f"{_T5_LAYER}.0.SelfAttention.v": "colwise",
    f"{_T5_LAYER}.0.SelfAttention.o": "rowwise",
    f"{_T5_LAYER}.0.SelfAttention.relative_attention_bias": "colwise",  # a column per head
    f"{_T5_LAYER}.1.DenseReluDense.wi": "colwise",
    f"{_T5_LAYER}.1.DenseReluDense.wi_0": "colwise",
    f"{_T5_LAYER}.1.DenseReluDense.wi_1": "colwise",
    f"{_T5_LAYER}.1.DenseReluDense.wo": "rowwise",
}
_QWEN3_VL_LAYER = "model.language_model.layers.*"
_QWEN3_VL = {
    "lm_head": "colwise_gather_output",
    "model.language_model.embed_tokens": "embedding_rowwise",
    f"{_QWEN3_VL_LAYER}.self_attn.q_proj": "colwise",
    f"{_QWEN3_VL_LAYER}.self_attn.k_proj": "colwise",
    f"{_QWEN3_VL_LAYER}.self_attn.v_proj": "colwise",
    f"{_QWEN3_VL_LAYER}.self_attn.o_proj": "rowwise",
    f"{_QWEN3_VL_LAYER}.mlp.gate_proj": "colwise",
    f"{_QWEN3_VL_LAYER}.mlp.up_proj": "colwise",
    f"{_QWEN3_VL_LAYER}.mlp.down_proj": "rowwise",
}

ENCODER_PLANS: dict[str, dict[str, str]] = {
    "Qwen3VLForConditionalGeneration": _QWEN3_VL,
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
}
# Classes of modules, and their numbers that become a rank's share.
ENCODER_SHARES = {"T5Attention": ("n_heads", "inner_dim"), "UMT5Attention": ("n_heads", "inner_dim")}
