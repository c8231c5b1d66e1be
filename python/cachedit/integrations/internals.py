"""Classes inside ``cache_dit`` that engines import, subclass, or replace methods of.

They are reached under that name only (:mod:`cachedit.alias`). What they do there is done by other means here, so these
classes have just what the engines touch: enough for SGLang's and vLLM-Omni's own modules to run unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__all__ = [
    "CachedAdapter",
    "CachedBlocks_Pattern_0_1_2",
    "CachedBlocks_Pattern_3_4_5",
    "CachedContextManager",
    "FakeDiffusionPipeline",
]


class FakeDiffusionPipeline:
    """Stands for the pipeline of a transformer without one. Nothing is an instance of it here."""


class CachedAdapter:
    """Puts a cache on what an adapter describes. Subclasses of it are how engines change ``cache_dit``'s blocks."""

    @classmethod
    def apply(cls, pipe_or_adapter: Any, **settings: Any) -> Any:
        """Call :func:`cachedit.enable_cache` with the same arguments.

        Raises:
            NotImplementedError: From a subclass that changes how blocks are run, and is not known (``special.py``).
        """
        from ..api import enable_cache  # these import this module
        from .special import serve

        between = cls.__mro__[: cls.__mro__.index(CachedAdapter)]
        changes = any(not name.startswith("__") for part in between for name in vars(part))
        enable_cache(serve(cls, pipe_or_adapter) if changes else pipe_or_adapter, **settings)
        return pipe_or_adapter


class _CachedBlocks:
    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError(f"{type(self).__name__}: cachedit does not replace block lists by modules")


class CachedBlocks_Pattern_0_1_2(_CachedBlocks):
    """Base class only."""


class CachedBlocks_Pattern_3_4_5(_CachedBlocks):
    """Base class only."""


class CachedContextManager:
    """Takes an engine's process groups, and has the ranks of them decide alike.

    A transformer that an engine shares out by itself, and marks with ``_is_parallelized``, gets one as
    ``_context_manager`` when the cache is enabled. SGLang sets three attributes of it: the groups of sequence
    parallelism, of tensor parallelism, and of both together, which is taken where there is one.

    Args:
        join: Called with the group whose ranks' sums are to be added, or None.
    """

    _sglang_sp_group: Any = None
    _sglang_tp_group: Any = None
    _sglang_tp_sp_group: Any = None

    def __init__(self, join: Callable[[Any], None]):
        vars(self)["_join"] = join

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name.startswith("_sglang_"):
            vars(self)["_join"](self._sglang_tp_sp_group or self._sglang_sp_group or self._sglang_tp_group)

    def similarity(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Never called: SGLang replaces it to average over its groups, over which sums are added here anyhow."""
        raise NotImplementedError("CachedContextManager.similarity: cachedit measures differences by its own operators")
