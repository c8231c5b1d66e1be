"""Patches for loops that do more than call one block after the other; the model table names them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..patch_functor import PatchFunctor

__all__ = ["LattePatch"]

# Frames of the video that the running forward of a patched Latte works on; None without temporal attention.
_frames: ContextVar[int | None] = ContextVar("frames", default=None)


class LattePatch(PatchFunctor):
    """Makes one block of each pair of Latte's: spatial attention within frames, then temporal attention across them.

    Latte's loop goes through two lists at once, and lays the tokens out anew between their blocks: (batch * frames,
    patches, dim) for spatial ones, (batch * patches, frames, dim) for temporal ones. Here each spatial block does its
    partner's part as well, and the loop is told to leave temporal attention out: what remains is one list of pattern 2
    whose streams are always laid out as for spatial blocks.
    """

    def _apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> None:
        blocks: Any = transformer.transformer_blocks
        partners: Any = transformer.temporal_transformer_blocks
        for number, (block, partner) in enumerate(zip(blocks, partners, strict=True)):
            block.forward = _LattePair(block.forward, partner, transformer if number == 0 else None)
        transformer.forward = _LatteForward(transformer.forward)


class _LatteForward:
    """Latte's forward without temporal attention in its loop."""

    def __init__(self, original: Callable[..., Any]):
        functools.update_wrapper(self, original)
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        temporal = given.pop("enable_temporal_attentions", True)
        token = _frames.set(given["hidden_states"].shape[2] if temporal else None)
        try:
            return self.original(**given, enable_temporal_attentions=False)
        finally:
            _frames.reset(token)


class _LattePair:
    """A spatial block's forward, and its temporal partner's.

    Args:
        original: The spatial block's forward.
        partner: The temporal block.
        positions: For the first pair: the transformer, whose temporal position embeddings are added before its partner.
    """

    def __init__(self, original: Callable[..., torch.Tensor], partner: nn.Module, positions: nn.Module | None):
        functools.update_wrapper(self, original)
        self.original, self.partner, self.positions = original, partner, positions
        self.timestep_index = list(inspect.signature(original).parameters).index("timestep")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = self.original(*args, **kwargs)
        frames = _frames.get()
        if frames is None:
            return hidden_states
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self.timestep_index]  # (batch * frames, dim)
        patches = hidden_states.shape[1]
        hidden_states = hidden_states.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        if self.positions is not None and frames > 1:
            embedding: Any = self.positions.temp_pos_embed
            hidden_states = hidden_states + embedding.to(hidden_states.dtype)
        timestep = timestep[::frames].repeat_interleave(patches, dim=0)
        hidden_states = self.partner(hidden_states, timestep=timestep)
        return hidden_states.unflatten(0, (-1, patches)).transpose(1, 2).flatten(0, 1)
