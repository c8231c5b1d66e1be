"""How diffusers' attention modules get to run over all ranks' tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import SequenceAttention

__all__ = ["parallelise_attention"]


def parallelise_attention(modules: Sequence[nn.Module], attention: SequenceAttention) -> Callable[[], None]:
    """Have attention modules of diffusers run over all ranks' tokens; returns what undoes it.

    Processors that call diffusers' attention dispatcher get a backend and a configuration of it. The others call
    ``scaled_dot_product_attention`` themselves: theirs is intercepted, within their own calls only.

    Args:
        modules: Attention modules with a ``processor``.
        attention: What they run.
    """
    changed: list[tuple[Any, dict[str, Any], type]] = []
    classes: dict[type, type] = {}  # one for all blocks, or each would be compiled by itself
    handles = [module.register_forward_pre_hook(_Unchanged(module.processor)) for module in modules]
    for processor in {id(module.processor): module.processor for module in modules}.values():
        changed.append((processor, dict(vars(processor)), processor.__class__))
        mode: type[_EmptyPieces] = _Interception
        if hasattr(processor, "_parallel_config"):
            vars(processor).update(_parallel_config=attention, _attention_backend=_backend(attention.backend))
            mode = _EmptyPieces
        cls = processor.__class__
        if cls not in classes:
            classes[cls] = _within(mode, cls, attention)
        processor.__class__ = classes[cls]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for processor, before, cls in changed:
            processor.__class__ = cls
            for name in ("_parallel_config", "_attention_backend"):
                vars(processor).pop(name, None)
                if name in before:
                    vars(processor)[name] = before[name]

    return undo


class _Unchanged:
    """A processor that is put in place of the one that was made parallel would attend over this rank's tokens alone."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, module: Any, args: Any) -> None:
        if module.processor is not self.processor:
            raise RuntimeError(
                f"attention is sequence-parallel here, and its processor was replaced by a "
                f"{type(module.processor).__name__}: enable parallelism after processors are set; pipelines that set "
                "their own while they run (perturbed-attention guidance) cannot be split over a sequence"
            )


@functools.cache
def _backend(local_backend: str | None) -> Any:
    """Our entry in diffusers' registry of attention backends. It is known by the object alone, not by its name.

    Args:
        local_backend: The backend for what is left to one rank; None for the active one.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )

    name = str.__new__(AttentionBackendName, "cachedit")
    name._name_ = name._value_ = f"cachedit_sequence_parallel_{local_backend}"
    backend = None if local_backend is None else AttentionBackendName(local_backend)

    @_AttentionBackendRegistry.register(name)
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: SequenceAttention | None = None,
    ) -> Tensor:
        def local(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return dispatch_attention_fn(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, backend=backend)

        if _parallel_config is None:  # a processor's cross-attention over tokens that every rank has
            return local(query, key, value, attn_mask)
        _check_causal(is_causal)
        return _parallel_config(query, _all_heads(key, query), _all_heads(value, query), attn_mask, local, scale)

    return name


def _within(mode: type[_EmptyPieces], original: type, attention: SequenceAttention) -> type:
    """A processor class whose calls run in a mode."""

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if mode is _EmptyPieces and not attention.pieces.empty:
            return original.__call__(self, *args, **kwargs)
        with mode(attention):
            return original.__call__(self, *args, **kwargs)

    return type(original.__name__, (original,), {"__call__": call, "_cachedit_attention": attention})


class _EmptyPieces(TorchFunctionMode):
    """Inside, an empty tensor can be reshaped with a size left open, as where a short text leaves a rank none of it."""

    def __init__(self, attention: SequenceAttention):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.reshape and args[0].numel() == 0:
            tensor, *shape = args if len(args) > 2 else (args[0], *args[1])
            if 0 in shape and -1 in shape:  # torch cannot tell -1: take it as if what is empty had one token
                filled = math.prod(max(size, 1) for size in tensor.shape)
                known = math.prod(max(size, 1) for size in shape)
                return func(tensor, [filled // known if size == -1 else size for size in shape])
        return func(*args, **(kwargs or {}))


class _Interception(_EmptyPieces):
    """Inside, ``scaled_dot_product_attention`` runs over all ranks' tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def local(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale).transpose(1, 2)

        _check_causal(is_causal)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, L, H, D]
        key, value = _all_heads(key, query), _all_heads(value, query)
        return self.attention(query, key, value, attn_mask, local, scale).transpose(1, 2)


def _check_causal(is_causal: bool) -> None:
    if is_causal:
        raise ValueError("is_causal must be False under sequence parallelism")


def _all_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values, repeated where several of the query's heads share one."""
    heads, shared = query.shape[2], tensor.shape[2]
    return tensor if heads == shared else tensor.repeat_interleave(heads // shared, dim=2)
