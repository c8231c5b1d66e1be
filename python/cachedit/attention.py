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
# Backends that raise at their first call with a mask.
_MASKLESS = frozenset({
    "flash", "flash_hub", "flash_4_hub", "_flash_3", "_flash_3_hub", "aiter_fa2_hub", "_native_flash", "_native_xla",
    "sage", "sage_hub", "sage_blackwell_hub", "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton",
})  # fmt: skip
# Transformers that are called with a mask in every request of their pipelines. Others, such as Qwen-Image's, get one
# only where prompts of different lengths are batched: there it is the backend that raises, in the first step.
_MASKED = frozenset({
    "AceStepTransformer1DModel", "BriaFiboTransformer2DModel", "ChromaTransformer2DModel",
    "ErnieImageTransformer2DModel", "HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoTransformer3DModel", "Ideogram4Transformer2DModel", "JoyImageEditPlusTransformer3DModel",
    "Krea2Transformer2DModel", "LongCatAudioDiTTransformer", "LTX2VideoTransformer3DModel",
    "LTXVideoTransformer3DModel", "MotifVideoTransformer3DModel", "PRXTransformer2DModel",
    "QwenImage21Transformer2DModel", "SanaVideoTransformer3DModel", "SanaWMTransformer3DModel",
})  # fmt: skip


def set_attention_backend(pipe_or_adapter: Any, attention_backend: str | None = None) -> None:
    """Set the attention backend of a pipeline's transformers; other models keep theirs.

    Args:
        pipe_or_adapter: A pipeline, an adapter, a transformer or a list of transformers.
        attention_backend: Name of a diffusers attention backend, such as ``"native"`` or ``"flash"``; ``"sdpa"`` and
            ``"_sdpa_cudnn"`` are older names of ``"native"`` and ``"_native_cudnn"``. None changes nothing.

    Raises:
        ValueError: For a name that diffusers does not know; for a backend that cannot be used here, or not by this
            model, which may need a mask or not have a choice. It says why, and names those that can.
        TypeError: For what is not a name; where there is no diffusers model to set it on. Nothing is changed then.
    """
    if attention_backend is None:
        return
    name = _find_name(attention_backend)
    transformers = transformers_of(pipe_or_adapter)
    unable = [module for module in transformers if not hasattr(module, "set_attention_backend")]
    if unable or not transformers:
        owner = type((unable or [pipe_or_adapter])[0]).__name__
        raise TypeError(f"attention_backend: {owner} has no set_attention_backend, as models of diffusers do")
    from diffusers import attention_backend as default_backend

    before = [(processor, processor._attention_backend) for each in transformers for processor in _processors(each)]
    try:
        for transformer in transformers:
            _check(name, transformer)
        # diffusers would also make the backend the default of all models in the process; this puts the default back.
        with default_backend("native"):
            for transformer in transformers:
                transformer.set_attention_backend(name)
    except (ImportError, RuntimeError, ValueError) as error:
        for processor, backend in before:
            processor._attention_backend = backend
        raise ValueError(
            f"attention_backend {attention_backend!r} cannot be used here: {error} "
            f"(those that can: {', '.join(_usable(transformers))})"
        ) from error


set_attn_backend = set_attention_backend  # as cache_dit calls it


def _find_name(name: Any) -> str:
    from diffusers.models.attention_dispatch import AttentionBackendName

    if not isinstance(name, str):
        raise TypeError(f"attention_backend must be a name, got {name!r}")
    found, names = _OLD_NAMES.get(name.lower(), name.lower()), [backend.value for backend in AttentionBackendName]
    if found not in names:
        raise ValueError(f"attention_backend must be one of {', '.join([*names, *_OLD_NAMES])}, got {name!r}")
    return found


def _processors(transformer: nn.Module) -> list[Any]:
    """What calls diffusers' dispatcher, with a backend of its own."""
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    return [processor for processor in processors if hasattr(processor, "_attention_backend")]


def _check(name: str, transformer: nn.Module) -> None:
    """Raise RuntimeError for what diffusers does not look at when a backend is set."""
    model = type(transformer).__name__
    if name in _CUDA_ONLY and not torch.cuda.is_available():
        raise RuntimeError("it needs a CUDA device")
    if name in _MASKLESS and any(cls.__name__ in _MASKED for cls in type(transformer).__mro__):
        raise RuntimeError(f"it takes no mask, and {model} is always called with one")
    if name != "native" and not _processors(transformer):
        raise RuntimeError(f"{model} has no attention whose backend can be set")


def _usable(transformers: list[nn.Module]) -> list[str]:
    """The backends whose packages and devices are here, and that these transformers can use."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    usable = []
    for backend in AttentionBackendName:
        try:
            for transformer in transformers:
                _check(backend.value, transformer)
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
