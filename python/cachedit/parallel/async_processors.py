"""Attention of diffusers' processors taken apart, so that each of V, Q and K can leave as soon as it is there.

A row is a function with the parameters of a processor's ``__call__``. It says how each of the three is computed from
what the processor is given, and what is made of attention's result; the arithmetic is the processor's own. It returns
None for calls that are not attention over split sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Coming

__all__ = ["FAMILIES", "NORM_FIRST", "ROWS", "Steps"]

FAMILIES = "FLUX, FLUX.2, Qwen-Image, Z-Image, Ovis-Image, LongCat-Image, Wan"

# Blocks whose norm gives the attention its input and whose MLP reads the same and is computed before attention:
# theirs can begin at the norm, and its result be on its way during the MLP.
NORM_FIRST = ("FluxSingleTransformerBlock", "OvisImageSingleTransformerBlock", "LongCatImageSingleTransformerBlock")

Part = Callable[[str], Tensor]


class Steps(NamedTuple):
    """One call of a processor.

    Args:
        part: Computes ``"v"``, ``"q"`` or ``"k"``, [B, L, H, D], as attention takes it.
        finish: Makes of the coming result, [B, L, H * D], what the processor returns; what it does before it waits
            overlaps with the exchange.
        mask: As attention takes it.
    """

    part: Part
    finish: Callable[[Coming], Any]
    mask: Tensor | None = None


def flux(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Steps:
    """FLUX, FLUX.2's double blocks, Ovis-Image, LongCat-Image: text before image, or both joined already."""
    streams = [_Stream(attn, hidden_states, attn.head_dim)]
    if attn.added_kv_proj_dim is not None:
        streams.insert(0, _Stream(attn, encoder_hidden_states, attn.head_dim, text=True))

    def part(name: str) -> Tensor:
        return _rotated(torch.cat([stream(name) for stream in streams], dim=1), name, image_rotary_emb)

    def finish(result: Coming) -> Any:
        out = result()
        return out if encoder_hidden_states is None else _two_streams(attn, out, encoder_hidden_states.shape[1])

    return Steps(part, finish, attention_mask)


def flux2_single(
    attn: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, image_rotary_emb: Any = None
) -> Steps:
    """FLUX.2's single blocks: Q, K, V and the MLP have one projection in and one out."""
    shares = (attn.inner_dim,) * 3 + (attn.mlp_hidden_dim * attn.mlp_mult_factor,)
    projected = _fused(attn.to_qkv_mlp_proj, hidden_states, shares)

    def part(name: str) -> Tensor:
        tokens = projected("qkv".index(name)).unflatten(-1, (-1, attn.head_dim))
        return _rotated(_normed(attn, f"norm_{name}", tokens), name, image_rotary_emb)

    def finish(result: Coming) -> Any:
        mlp = attn.mlp_act_fn(projected(3))
        return attn.to_out(torch.cat([result(), mlp], dim=-1))

    return Steps(part, finish, attention_mask)


def qwen_image(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Steps | None:
    """Qwen-Image: text before image; rotary embeddings for each, and a mask over the text."""
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    if encoder_hidden_states is None or attention_mask is not None:
        return None  # which is an error of the processor's
    head_dim = attn.inner_dim // attn.heads
    text, image = _Stream(attn, encoder_hidden_states, head_dim, text=True), _Stream(attn, hidden_states, head_dim)

    def part(name: str) -> Tensor:
        tokens = [text(name), image(name)]
        if name != "v" and image_rotary_emb is not None:
            frequencies = reversed(image_rotary_emb)  # they are for image and text
            rotate: Any = apply_rotary_emb_qwen
            tokens = [rotate(t, f, use_real=False) for t, f in zip(tokens, frequencies, strict=True)]
        return torch.cat(tokens, dim=1)

    mask = encoder_hidden_states_mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)], dim=1)[:, None, None, :]
    length = encoder_hidden_states.shape[1]
    return Steps(part, lambda result: _two_streams(attn, result(), length), mask)


def z_image(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    freqs_cis: Tensor | None = None,
) -> Steps:
    """Z-Image: one sequence; rotary embeddings as complex numbers."""

    def part(name: str) -> Tensor:
        tokens = getattr(attn, f"to_{name}")(hidden_states)
        tokens = _normed(attn, f"norm_{name}", tokens.unflatten(-1, (attn.heads, -1)))
        if name == "v" or freqs_cis is None:
            return tokens
        pairs = torch.view_as_complex(tokens.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs_cis.unsqueeze(2)).flatten(3).type_as(tokens)

    return Steps(part, lambda result: _one_stream(attn, result()), attention_mask)


def wan(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Steps | None:
    """Wan's self-attention: norms across heads; rotary embeddings of neighbouring channels."""
    if encoder_hidden_states is not None:
        return None  # every rank has the text
    projected = _projections(attn, hidden_states, "to_{}", "to_qkv")

    def part(name: str) -> Tensor:
        tokens: Tensor = _normed(attn, f"norm_{name}", projected(name)).unflatten(2, (attn.heads, -1))
        if name == "v" or rotary_emb is None:
            return tokens
        x, y = tokens.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
        return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2).type_as(tokens)

    return Steps(part, lambda result: _one_stream(attn, result()), attention_mask)


ROWS: dict[str, Callable[..., Steps | None]] = {
    "FluxAttnProcessor": flux,
    "Flux2AttnProcessor": flux,
    "Flux2ParallelSelfAttnProcessor": flux2_single,
    "LongCatImageAttnProcessor": flux,
    "OvisImageAttnProcessor": flux,
    "QwenDoubleStreamAttnProcessor2_0": qwen_image,
    "WanAttnProcessor": wan,
    "ZSingleStreamAttnProcessor": z_image,
}


class _Stream:
    """Q, K and V of text or image tokens, [B, L, H, D], normed, before rotary embeddings."""

    def __init__(self, attn: Any, tokens: Any, head_dim: int, text: bool = False):
        names, fused = ("add_{}_proj", "to_added_qkv") if text else ("to_{}", "to_qkv")
        self.attn = attn
        self.norm = "norm_added_" if text else "norm_"
        self.projected = _projections(attn, tokens, names, fused)
        self.head_dim = head_dim

    def __call__(self, name: str) -> Tensor:
        # The head count is left open, as it is smaller under tensor parallelism.
        return _normed(self.attn, self.norm + name, self.projected(name).unflatten(-1, (-1, self.head_dim)))


def _normed(attn: Any, norm: str, tokens: Any) -> Tensor:
    """V has no norm, and some models have none for Q and K."""
    module: Callable[[Any], Any] | None = getattr(attn, norm, None)
    return cast("Tensor", tokens if module is None else module(tokens))


def _rotated(tokens: Tensor, name: str, rotary: Any) -> Tensor:
    """Q and K with FLUX's rotary embeddings, V as it is."""
    from diffusers.models.embeddings import apply_rotary_emb

    return tokens if name == "v" or rotary is None else cast("Tensor", apply_rotary_emb(tokens, rotary, sequence_dim=1))


def _projections(attn: Any, tokens: Tensor, names: str, fused: str) -> Part:
    if not getattr(attn, "fused_projections", False) or not hasattr(attn, fused):
        return lambda name: getattr(attn, names.format(name))(tokens)
    projected = _fused(getattr(attn, fused), tokens, (1, 1, 1))
    return lambda name: projected("qkv".index(name))


def _fused(layer: Any, tokens: Tensor, shares: Sequence[int]) -> Callable[[int], Tensor]:
    """Outputs of a layer that several projections are fused into, by their place.

    Each is computed when it is asked for, by its rows of the weight, if the layer is a plain one: without LoRA, hooks,
    and quantised or sharded weights. Otherwise all are computed at once.

    Args:
        shares: Of the layer's output features.
    """

    def sizes(features: int) -> list[int]:
        return [share * features // sum(shares) for share in shares]

    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and "forward" not in vars(layer)
    if not plain or layer._forward_hooks or layer._forward_pre_hooks:
        whole = layer(tokens)
        pieces: Sequence[Tensor] = whole.split(sizes(whole.shape[-1]), dim=-1)
        return pieces.__getitem__
    weights = layer.weight.split(sizes(layer.out_features))
    biases = [None] * len(shares) if layer.bias is None else layer.bias.split(sizes(layer.out_features))
    return lambda place: F.linear(tokens, weights[place], biases[place])


def _one_stream(attn: Any, out: Tensor) -> Tensor:
    for layer in attn.to_out:  # a projection, and dropout
        out = layer(out)
    return out


def _two_streams(attn: Any, out: Tensor, text: int) -> tuple[Tensor, Tensor]:
    """Projects what belongs to the image and what to the text, which comes first."""
    return _one_stream(attn, out[:, text:].contiguous()), attn.to_add_out(out[:, :text].contiguous())
