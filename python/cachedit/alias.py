"""``import cache_dit`` gets this package: for scripts that are not to be changed.

    import cachedit.alias
    cachedit.alias.install()

Or, without touching the script at all, ``python -m cachedit run script.py ...``.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install", "uninstall"]

_INTERNALS = "cachedit.integrations.internals"  # what engines reach into cache_dit for

# Modules of cache_dit, and where their names come from: the first that has one.
_SOURCES = {
    "cache_dit": ("cachedit",),
    "cache_dit.caching": ("cachedit",),
    "cache_dit.caching.block_adapters": ("cachedit", _INTERNALS),
    "cache_dit.caching.cache_adapters": (_INTERNALS,),
    "cache_dit.caching.cache_adapters.cache_adapter": (_INTERNALS,),
    "cache_dit.caching.cache_blocks": (_INTERNALS,),
    "cache_dit.caching.cache_blocks.pattern_0_1_2": (_INTERNALS,),
    "cache_dit.caching.cache_blocks.pattern_3_4_5": (_INTERNALS,),
    "cache_dit.caching.cache_contexts": ("cachedit", _INTERNALS),
    "cache_dit.caching.cache_contexts.cache_manager": (_INTERNALS,),
    "cache_dit.caching.cache_contexts.calibrators": ("cachedit",),
    "cache_dit.caching.load_configs": ("cachedit",),
    "cache_dit.caching.patch_functors": ("cachedit",),
    "cache_dit.distributed": ("cachedit.parallel",),
    "cache_dit.metrics": ("cachedit.metrics",),
    "cache_dit.parallelism": ("cachedit.parallel",),
    "cache_dit.platforms": ("cachedit.platforms",),
    "cache_dit.quantization": ("cachedit.quantization",),
}
_lock = threading.Lock()
_replaced: dict[str, ModuleType] = {}  # modules of the real package, imported before an override
_overrides: bool | None = None  # whether what is installed does; None: nothing is


class _AliasModule(ModuleType):
    """Hands out the names of other modules, which are imported when the first of them is asked for."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name == "__version__":
            sources = [importlib.import_module(source) for source in _SOURCES[self.__name__]]
            for source in sources:
                if name in source.__all__:
                    return getattr(source, name)
            if "__getattr__" in vars(sources[0]):
                return sources[0].__getattr__(name)  # tells which names are not available yet
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # caching.load_configs is a module and a function of its package; attribute access gives the function.
        if not isinstance(value, _AliasModule) or not hasattr(self, name):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        sources = map(importlib.import_module, _SOURCES[self.__name__])
        return sorted({*super().__dir__(), *(name for source in sources for name in source.__all__)})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, origin="cachedit.alias", is_package=True) if name in _SOURCES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AliasModule(spec.name, f"The part of cachedit that answers to the name {spec.name}.")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: names are looked up when they are used."""


_finder = _Finder()


def install(override: bool = False) -> None:
    """Let ``import cache_dit``, and the modules within it that scripts use, find this package.

    Args:
        override: Also where the real ``cache_dit`` is installed, or imported already. Without it the real one is
            found where there is one. Names that were imported from it before stay what they are.
    """
    global _overrides
    with _lock:
        if _overrides is not override or _finder not in sys.meta_path:  # else other threads may be importing by it
            _remove()
            sys.meta_path.insert(0 if override else len(sys.meta_path), _finder)
            _overrides = override
        if override:
            real = [name for name in _loaded() if not isinstance(sys.modules[name], _AliasModule)]
            _replaced.update({name: sys.modules.pop(name) for name in real})


def uninstall() -> None:
    """Undo :func:`install`; nothing happens where it is not installed."""
    with _lock:
        _remove()


def _remove() -> None:
    global _overrides
    _overrides = None
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in _loaded():
        if isinstance(sys.modules[name], _AliasModule):
            del sys.modules[name]
    sys.modules.update(_replaced)
    _replaced.clear()


def _loaded() -> list[str]:
    return [name for name in list(sys.modules) if name.partition(".")[0] == "cache_dit"]
