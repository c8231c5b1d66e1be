"""Models of engines whose loops do more than pass streams on from block to block, and what serves them here.

vLLM-Omni gives such a model a subclass of ``cache_dit``'s ``CachedAdapter``, with blocks of its own, which
``_cache_dit_adapter_config`` names. Facts are from vllm-project/vllm-omni at d624074 and 3f9cdf0.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..patch_functor import PatchFunctor, is_patched

__all__ = ["ADAPTERS", "InjectInBlocks", "denoises_image", "serve"]


class InjectInBlocks(PatchFunctor):
    """Wan 2.2 S2V adds audio between its blocks: here each block does so at its end, and a reused step leaves it out.

    Its loop calls ``after_transformer_block(index, hidden_states)`` on what each block returns; that hands its argument
    on while the patch is applied.
    """

    def _apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> None:
        kind: Any = type(transformer)  # vLLM-Omni replaces the method of the instance
        inject = functools.partial(kind.after_transformer_block, transformer)
        for index, block in enumerate(transformer.get_submodule("blocks").children()):
            block.forward = _followed_by(block.forward, functools.partial(inject, index))
        vars(transformer)["after_transformer_block"] = _hand_on


def _followed_by(forward: Callable[..., Any], inject: Callable[[Any], Any]) -> Callable[..., Any]:
    def injecting(*args: Any, **kwargs: Any) -> Any:
        return inject(forward(*args, **kwargs))

    vars(injecting)["__signature__"] = inspect.signature(forward)  # in which the streams are found
    return injecting


def _hand_on(index: int, hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def denoises_image(
    *args: Any, image_gen_indicators: Any = None, update_cache: bool = True, cache_dit_skip: bool = False, **kwargs: Any
) -> bool:
    """Whether a call of SenseNova-U1's language model denoises: all its tokens are an image's, and none are remembered.

    The others read the prompt; ``cache_dit_skip`` marks those of steps in which a guidance branch is left out.
    """
    if cache_dit_skip or update_cache or image_gen_indicators is None:
        return False
    return bool(image_gen_indicators.all())


def _as_it_is(adapter: Any) -> Any:
    return adapter


def _inject_in_blocks(adapter: Any) -> Any:
    # Not as the adapter's patch: when vLLM-Omni disables the cache, its own no-op stays in after_transformer_block's
    # place, so that blocks have to go on adding the audio.
    transformer = adapter.transformer
    if not is_patched(transformer):
        InjectInBlocks().apply(transformer)
    return adapter


def _skip_reading(adapter: Any) -> Any:
    return dataclasses.replace(adapter, denoises=denoises_image)


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "BagelCachedAdapter": _as_it_is,  # blocks may return a key-value cache in the encoder's place
    "LTX2AudioCachedAdapter": _as_it_is,  # blocks are called one by one here, so that each gets its own arguments
    "SensenovaCachedAdapter": _skip_reading,
    "Wan22S2VCachedAdapter": _inject_in_blocks,
}
"""What makes a BlockAdapter serve where vLLM-Omni applies its own subclass, by the name of that."""


def serve(adapter_class: type, adapter: Any) -> Any:
    """Change ``adapter`` so that the cache does what ``adapter_class`` does with blocks of its own.

    Raises:
        NotImplementedError: If the class is none of :data:`ADAPTERS`.
    """
    change = ADAPTERS.get(adapter_class.__name__)
    if change is None:
        raise NotImplementedError(
            f"{adapter_class.__name__} changes how cache_dit runs blocks, which has no counterpart in cachedit; "
            f"those that are known: {', '.join(ADAPTERS)}"
        )
    return change(adapter)
