"""What stands in for a cached transformer's ``forward``, and where that is kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from .passes import Passes

if TYPE_CHECKING:
    from .controller import Controller

__all__ = ["CachedForward", "find_own_forward", "forward_slots"]


class CachedForward:
    """Stands in for a transformer's ``forward``; carries its signature, which pipelines inspect.

    Args:
        controller: The transformer's controller.
        original: Its own forward.
    """

    def __init__(self, controller: Controller, original: Any):
        from . import compiled  # imports dynamo: not before a cache is enabled

        functools.update_wrapper(self, original)
        self.controller = controller
        self.original = original
        self.passes = Passes(controller, original)
        self.is_compiling = compiled.is_compiling
        self.run_in_passes = compiled.run_in_passes
        _leave_calls_untraced()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_compiling():
            return self.run_in_passes(self, args, kwargs)
        return self.controller.forward(self.original, args, kwargs)


@functools.cache
def _leave_calls_untraced() -> None:
    """Have dynamo look into what ``CachedForward.__call__`` calls, not into itself."""
    from torch._dynamo.decorators import skip

    skip(CachedForward.__call__)


def forward_slots(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a module's own forward may be kept: accelerate and diffusers hooks replace ``module.forward``."""
    if "_old_forward" in vars(module):  # accelerate
        yield module, "_old_forward"
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "original_forward"
        yield reference, "forward"
    yield module, "forward"


def find_own_forward(module: nn.Module) -> tuple[Any, str]:
    """The slot that holds the module's own forward: inside of all hooks, so that they keep working in any order."""
    for holder, name in forward_slots(module):
        value = getattr(holder, name)
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward:
            return holder, name
    return module, "forward"
