"""Which models are served: those of the model table, and adapters that users register for classes of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

from torch import nn

from .adapter import BlockAdapter, TransformerPlan, plan_for, unwrapped
from .models import PIPELINES, find_entry, find_transformers, matrix_rows
from .models.matrix import TITLES

__all__ = ["BlockAdapterRegister", "get_adapter", "supported_matrix", "supported_pipelines"]

SGLANG_DESCRIBES = ("ErnieImageTransformer2DModel", "Krea2Transformer2DModel")

Factory = TypeVar("Factory", bound=Callable[..., BlockAdapter])


class BlockAdapterRegister:
    """Adapters by the beginning of a class name, a pipeline's or a transformer's.

    What users register comes before the model table, and of several names that fit, the longest counts.

    Example:
        >>> @BlockAdapterRegister.register("MyPipeline")
        ... def my_adapter(pipe, **kwargs):
        ...     blocks = pipe.transformer.layers
        ...     return BlockAdapter(pipe=pipe, blocks=blocks, forward_pattern=ForwardPattern.Pattern_3, **kwargs)
        >>> cachedit.enable_cache(MyPipeline(...))
    """

    _factories: ClassVar[dict[str, Callable[..., BlockAdapter]]] = {}

    @classmethod
    def register(cls, name: str, supported: bool = True) -> Callable[[Factory], Factory]:
        """Return a decorator that registers a function which makes adapters.

        Args:
            name: Beginning of a class name. A name that is registered already gets the new function.
            supported: False registers nothing.

        Raises:
            TypeError: For a name that is no text or empty, or, from the decorator, something else than a function.

        Returns:
            The decorator. Its function is called with the pipeline (for a transformer alone: an object with only the
            attribute ``transformer``) and the keyword arguments of :meth:`get_adapter`.
        """

        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be the beginning of a class name, got {name!r}")

        def decorate(factory: Factory) -> Factory:
            if not callable(factory):
                raise TypeError(f"what is registered for {name!r} must be a function, got {factory!r}")
            if supported:
                cls._factories[name] = factory
            return factory

        return decorate

    @classmethod
    def get_adapter(cls, pipe_or_module: Any, **kwargs: Any) -> BlockAdapter | None:
        """Return the adapter of a pipeline or a transformer, or None if its class is not known.

        Args:
            pipe_or_module: A pipeline or a ``torch.nn.Module``.
            **kwargs: Handed on to the registered function; for the model table, fields of :class:`BlockAdapter`.

        Raises:
            TypeError: If a registered function returns something else than a :class:`BlockAdapter`.
        """
        registered = cls.registered(pipe_or_module, **kwargs)
        if registered is not None:
            return registered
        alone = isinstance(pipe_or_module, nn.Module)
        transformers = [unwrapped(m) for m in ([pipe_or_module] if alone else find_transformers(pipe_or_module))]
        if not transformers or any(find_entry(transformer) is None for transformer in transformers):
            return None
        pipe = None if alone else pipe_or_module
        return _adapter_of(pipe, [plan_for(transformer, pipe) for transformer in transformers], **kwargs)

    @classmethod
    def registered(cls, pipe_or_module: Any, **kwargs: Any) -> BlockAdapter | None:
        """Return the adapter that a user's registration makes, or None if there is none for this class."""
        class_name = type(unwrapped(pipe_or_module)).__name__
        name = max((name for name in cls._factories if class_name.startswith(name)), key=len, default=None)
        if name is None:
            return None
        alone = isinstance(pipe_or_module, nn.Module)
        pipe = SimpleNamespace(transformer=pipe_or_module) if alone else pipe_or_module
        adapter = cls._factories[name](pipe, **kwargs)
        if not isinstance(adapter, BlockAdapter):
            raise TypeError(f"the function registered for {name!r} must return a BlockAdapter, got {adapter!r}")
        if alone:
            transformer = pipe_or_module if adapter.transformer is None else adapter.transformer
            return dataclasses.replace(adapter, pipe=None, transformer=transformer)
        return adapter if adapter.pipe is not None else dataclasses.replace(adapter, pipe=pipe)

    @classmethod
    def has_separate_cfg(cls, pipe_or_adapter_or_module: Any) -> bool:
        """Whether the transformer is called once per guidance branch without the pipeline naming the branch."""
        if isinstance(pipe_or_adapter_or_module, BlockAdapter):
            return pipe_or_adapter_or_module.has_separate_cfg
        adapter = cls.get_adapter(pipe_or_adapter_or_module)
        return adapter is not None and adapter.has_separate_cfg

    @classmethod
    def is_supported(cls, pipe_or_module: Any) -> bool:
        """Whether ``enable_cache`` serves a pipeline or transformer without an adapter being given.

        False for SGLang's own versions of :data:`SGLANG_DESCRIBES`: then it gives adapters, with what a request says
        of guidance.
        """
        kind = type(pipe_or_module)
        if kind.__module__.partition(".")[0] == "sglang" and kind.__name__ in SGLANG_DESCRIBES:
            return False
        return cls.get_adapter(pipe_or_module) is not None

    @classmethod
    def supported_pipelines(cls, **kwargs: Any) -> tuple[int, list[str]]:
        """Return how many pipelines are known, and their names: registered ones, then those of the pipeline table."""
        names = list(dict.fromkeys([*cls._factories, *PIPELINES]))
        return len(names), names


def get_adapter(pipe: Any) -> BlockAdapter | None:
    """Return the adapter that ``enable_cache`` would use: :meth:`BlockAdapterRegister.get_adapter`."""
    return BlockAdapterRegister.get_adapter(pipe)


def supported_pipelines(**kwargs: Any) -> tuple[int, list[str]]:
    """Return how many pipelines are known, and their names: :meth:`BlockAdapterRegister.supported_pipelines`."""
    return BlockAdapterRegister.supported_pipelines(**kwargs)


def supported_matrix() -> str:
    """Return a markdown table with one line per pipeline: transformer, block lists with patterns, guidance, tested.

    What users have registered comes first. ``cachedit.models.matrix_rows`` gives the other rows as data.
    """
    registered = [(name, "", "registered", "", "") for name in BlockAdapterRegister._factories]
    rule = ("---",) * len(TITLES)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (TITLES, rule, *registered, *matrix_rows()))


def _adapter_of(pipe: Any, plans: list[TransformerPlan], **fields: Any) -> BlockAdapter:
    lists = [[item for section in plan.sections for item in section] for plan in plans]
    return BlockAdapter(
        **{
            "pipe": pipe,
            "transformer": [plan.transformer for plan in plans],
            "blocks": [[item.blocks for item in named] for named in lists],
            "blocks_name": [[item.name for item in named] for named in lists],
            "forward_pattern": [[item.pattern for item in named] for named in lists],
            "check_forward_pattern": plans[0].check_forward_pattern,
            "has_separate_cfg": plans[0].has_separate_cfg,
            "patch_functor": plans[0].patch_functor,
            **fields,
        }
    )
