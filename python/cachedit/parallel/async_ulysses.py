"""Ulysses whose exchanges are under way while the next thing is computed.

V leaves before Q is projected, and Q before K is; attention waits for all three. Its result leaves at once and is
waited for where it is needed. How each kind of attention computes them is in async_processors.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .async_processors import FAMILIES, NORM_FIRST, ROWS, Steps
from .attention import Coming, SequenceAttention

__all__ = ["check_send_early", "send_early"]

logger = logging.getLogger(__name__)


def check_send_early(transformer: nn.Module, modules: Sequence[Any]) -> None:
    """Raise a ValueError if none of a transformer's attention modules can send Q, K and V one by one."""
    if not any(_row(module.processor) for module in modules):
        raise ValueError(
            f"ulysses_async: the attention of {type(transformer).__name__} cannot send Q, K and V one by one; that of "
            f"{FAMILIES} can. Leave it False"
        )


def send_early(transformer: nn.Module, modules: Sequence[Any], attention: SequenceAttention) -> Callable[[], None]:
    """Have attention modules of diffusers send each of V, Q, K and their result early; returns what undoes it.

    Processors that are not in the table stay as they are, and what they run sends Q, K and V together.

    Args:
        transformer: Has the modules.
        modules: Attention modules with a ``processor``.
        attention: What they run; its groups have a Ulysses group.
    """
    changed: list[tuple[Any, type]] = []
    classes: dict[type, type] = {}  # one for all blocks, or each would be compiled by itself
    others: set[str] = set()
    for processor in {id(module.processor): module.processor for module in modules}.values():
        row = _row(processor)
        if row is None:
            others.add(type(processor).__name__)
            continue
        cls = processor.__class__
        if cls not in classes:
            classes[cls] = _sending(cls, row, attention)
        changed.append((processor, cls))
        processor.__class__ = classes[cls]
    if others:
        logger.info("ulysses_async: %s sends Q, K and V together", ", ".join(sorted(others)))
    handles = [
        handle
        for block in transformer.modules()
        if type(block).__name__ in NORM_FIRST and any(block.attn is module for module in modules)
        for handle in _hooks(block)
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for processor, cls in changed:
            processor.__class__ = cls
            vars(processor).pop("_begun", None)

    return undo


def _row(processor: Any) -> Callable[..., Steps | None] | None:
    """The row of a processor that is diffusers' own, not somebody's who has changed how it is called."""
    for cls in type(processor).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in ROWS:
            return ROWS[cls.__name__] if inspect.unwrap(type(processor).__call__) is vars(cls)["__call__"] else None
    return None


def _sending(original: Any, row: Callable[..., Steps | None], attention: SequenceAttention) -> type:
    """A processor class whose calls follow a row."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    backend = None if attention.backend is None else AttentionBackendName(attention.backend)

    def local(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return dispatch_attention_fn(q, k, v, mask, backend=backend)

    def result_of(steps: Steps) -> Coming:
        result = attention.begin(steps.part, steps.mask, local)
        return lambda: result().flatten(2, 3)

    @functools.wraps(original.__call__)
    def call(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given, steps, result = vars(self).pop("_begun", (None, None, None))
        if given is not hidden_states:
            steps = row(attn, hidden_states, *args, **kwargs)
            if steps is None:
                return original.__call__(self, attn, hidden_states, *args, **kwargs)
            result = result_of(steps)
        return steps.finish(result)

    def begin(self: Any, attn: Any, hidden_states: Tensor, **kwargs: Any) -> None:
        """For the call with these hidden states, which will come."""
        steps = row(attn, hidden_states, **kwargs)
        assert steps is not None
        vars(self)["_begun"] = hidden_states, steps, result_of(steps)

    return type(original.__name__, (original,), {"__call__": call, "_cachedit_begin": begin})


def _hooks(block: Any) -> list[Any]:
    """Have a block's attention begin as soon as its norm is computed."""
    names = list(inspect.signature(block.forward).parameters)
    given: dict[str, Any] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        given["image_rotary_emb"] = named.get("image_rotary_emb")
        given["attention_mask"] = (named.get("joint_attention_kwargs") or {}).get("attention_mask")

    def begin(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        start = getattr(block.attn.processor, "_cachedit_begin", None)
        if start is not None and given:
            start(block.attn, output[0], **given)
        given.clear()

    return [block.register_forward_pre_hook(remember, with_kwargs=True), block.norm.register_forward_hook(begin)]
