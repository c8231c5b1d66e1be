"""The model table: per transformer class, its block lists, their patterns, and which of them share a decision."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..pattern import ForwardPattern as P

__all__ = ["MODELS", "BlockList", "ModelEntry", "find_entry"]


class BlockList(NamedTuple):
    """One block list: its dotted name within the transformer, and its pattern."""

    name: str
    pattern: P


class ModelEntry(NamedTuple):
    """One transformer class.

    ``sections``: groups of block lists in calling order. The lists of a group carry the same streams and share one
    decision, so a reused step skips the later ones whole; groups decide separately.
    """

    sections: tuple[tuple[BlockList, ...], ...]


def _lists(**patterns: P) -> tuple[BlockList, ...]:
    return tuple(BlockList(name, pattern) for name, pattern in patterns.items())


def _linked(**patterns: P) -> ModelEntry:
    """Lists that carry the same streams: one decision."""
    return ModelEntry(sections=(_lists(**patterns),))


MODELS: dict[str, ModelEntry] = {
    "FluxTransformer2DModel": _linked(transformer_blocks=P.Pattern_1, single_transformer_blocks=P.Pattern_1),
    "HeliosTransformer3DModel": _linked(blocks=P.Pattern_2),
    "QwenImageTransformer2DModel": _linked(transformer_blocks=P.Pattern_1),
    "WanTransformer3DModel": _linked(blocks=P.Pattern_2),
}


def find_entry(transformer: nn.Module) -> ModelEntry | None:
    """Return the entry of a transformer's class, or of the nearest base class that has one."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in MODELS:
            return MODELS[cls.__name__]
    return None
