"""Attention backends: those of diffusers, set on single transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .adapter import BlockAdapter
from .models import find_transformers

__all__ = ["set_attention_backend", "set_attn_backend", "transformers_of"]

_OLD_NAMES = {"sdpa": "native", "_sdpa_cudnn": "_native_cudnn"}  # of cache_dit
_CUDA_ONLY = ("_native_cudnn", "_native_efficient")  # diffusers checks packages, not devices


def set_attention_backend(pipe_or_adapter: Any, attention_backend: str | None = None) -> None:
    """Set the attention backend of a pipeline's transformers; other models keep theirs.

    Args:
        pipe_or_adapter: A pipeline, an adapter, a transformer or a list of transformers.
        attention_backend: Name of a diffusers attention backend, such as ``"native"`` or ``"flash"``; ``"sdpa"`` and
            ``"_sdpa_cudnn"`` are older names of ``"native"`` and ``"_native_cudnn"``. None changes nothing.

    Raises:
        ValueError: For a name that diffusers does not know, or a backend that cannot be used here; it says why, and
            names those that can.
        TypeError: Where there is no diffusers model to set it on. Nothing is changed then.
    """
    if attention_backend is None:
        return
    name = _OLD_NAMES.get(attention_backend, attention_backend)
    transformers = transformers_of(pipe_or_adapter)
    unable = [module for module in transformers if not hasattr(module, "set_attention_backend")]
    if unable or not transformers:
        owner = type((unable or [pipe_or_adapter])[0]).__name__
        raise TypeError(f"attention_backend: {owner} has no set_attention_backend, as models of diffusers do")
    from diffusers import attention_backend as default_backend

    # diffusers would also make the backend the default of all models in the process; this puts the default back.
    with default_backend("native"):
        for transformer in transformers:
            try:
                _check_device(name)
                transformer.set_attention_backend(name)
            except (ImportError, RuntimeError) as error:
                raise ValueError(
                    f"attention_backend {attention_backend!r} cannot be used here: {error} "
                    f"(those that can: {', '.join(_usable())})"
                ) from error


set_attn_backend = set_attention_backend  # as cache_dit calls it


def _check_device(name: str) -> None:
    if name in _CUDA_ONLY and not torch.cuda.is_available():
        raise RuntimeError("it needs a CUDA device")


def _usable() -> list[str]:
    """The backends whose packages and devices are here."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    usable = []
    for backend in AttentionBackendName:
        try:
            _check_device(backend.value)
            _check_attention_backend_requirements(backend)
        except (ImportError, RuntimeError):
            continue
        usable.append(backend.value)
    return usable


def transformers_of(target: Any) -> list[Any]:
    """The transformers of a pipeline, an adapter, or a list of such; a module is one itself."""
    if isinstance(target, nn.Module):
        return [target]
    if not isinstance(target, (list, tuple)):
        if not isinstance(target, BlockAdapter):
            return list(find_transformers(target))
        target = [target.pipe if target.transformer is None else target.transformer]
    return [module for item in target for module in transformers_of(item)]
