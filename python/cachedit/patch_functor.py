"""PatchFunctor: changes that one transformer needs before it can be cached, undone when the cache is taken off."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

__all__ = ["PatchFunctor", "is_patched"]

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_cachedit_patch"


class _Missing:
    """Stands for no entry; the class itself is used, which stays the same object in deep copies."""


class _Change(NamedTuple):
    """One entry of a module's ``__dict__``, or of one of the dictionaries in it (``_modules`` and so on)."""

    module: nn.Module
    within: str | None
    name: str
    before: Any
    after: Any


class PatchFunctor:
    """Base class of patches; a subclass overrides :meth:`_apply`.

    What ``_apply`` sets on the transformer or on modules within it (attributes, submodules, a ``forward``) is noted and
    put back by :meth:`undo`. ``BlockAdapter(patch_functor=...)`` patches when the cache is enabled and undoes it when
    the cache is disabled.

    Example:
        >>> class PassTheMask(PatchFunctor):
        ...     def _apply(self, transformer):
        ...         transformer.forward = types.MethodType(forward_with_mask, transformer)
    """

    def apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Patch a transformer; one that is patched already stays as it is.

        Args:
            transformer: The transformer; only this object and the modules within it change, not their classes.
            *args: Handed on to ``_apply``.
            **kwargs: Likewise.

        Returns:
            ``transformer``.

        Raises:
            TypeError: If ``_apply`` sets the ``forward`` of a class, or returns another object than ``transformer`` or
                None. Nothing is changed then, nor when ``_apply`` raises.
        """
        if not isinstance(transformer, nn.Module):
            raise TypeError(f"transformer must be a torch.nn.Module, got {_name(transformer)}")
        if is_patched(transformer):
            logger.warning("%s is patched already: %s is not applied", _name(transformer), _name(self))
            return transformer
        before = [(module, within, dict(_entries(module, within))) for module, within in _places(transformer)]
        forwards = {cls: vars(cls).get("forward") for module in transformer.modules() for cls in type(module).__mro__}
        try:
            result = self._apply(transformer, *args, **kwargs)
            if result is not None and result is not transformer:
                raise TypeError(f"{_name(self)}._apply must change the transformer and return it, got {_name(result)}")
            for cls, forward in forwards.items():
                if vars(cls).get("forward") is not forward:
                    raise TypeError(f"{_name(self)}._apply set {cls.__name__}.forward; set it on the object instead")
        except BaseException:
            for cls, forward in forwards.items():
                if vars(cls).get("forward") is not forward:
                    delattr(cls, "forward") if forward is None else setattr(cls, "forward", forward)
            _put_back(_changes(before))
            raise
        vars(transformer)[_ATTRIBUTE] = _changes(before)
        return transformer

    def undo(self, transformer: nn.Module) -> None:
        """Put back what ``apply`` changed; nothing happens where nothing is patched.

        What somebody else has replaced since stays as it is, with a warning.
        """
        _put_back(vars(transformer).pop(_ATTRIBUTE, []))

    @contextmanager
    def applied(self, transformer: nn.Module) -> Iterator[None]:
        """Patch a transformer inside the ``with`` block only; one that was patched before stays so."""
        if is_patched(transformer):
            yield
            return
        self.apply(transformer)
        try:
            yield
        finally:
            self.undo(transformer)

    def _apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module | None:
        """Change the transformer in place, and return it or None."""
        raise NotImplementedError(f"{_name(self)} must override _apply(transformer, *args, **kwargs)")


def is_patched(transformer: nn.Module) -> bool:
    """Whether a :class:`PatchFunctor` is applied to a transformer."""
    return _ATTRIBUTE in vars(transformer)


def _places(transformer: nn.Module) -> Iterator[tuple[nn.Module, str | None]]:
    for module in transformer.modules():
        for within in (None, "_modules", "_parameters", "_buffers"):
            yield module, within


def _entries(module: nn.Module, within: str | None) -> dict[str, Any]:
    entries: dict[str, Any] = vars(module) if within is None else vars(module)[within]
    return entries


def _changes(before: list[tuple[nn.Module, str | None, dict[str, Any]]]) -> list[_Change]:
    changes = []
    for module, within, old in before:
        new = _entries(module, within)
        for name in {**old, **new}:
            values = old.get(name, _Missing), new.get(name, _Missing)
            if values[0] is not values[1]:
                changes.append(_Change(module, within, name, *values))
    return changes


def _put_back(changes: list[_Change]) -> None:
    for module, within, name, before, after in changes:
        entries = _entries(module, within)
        if entries.get(name, _Missing) is not after:
            logger.warning("%s.%s has been replaced since it was patched, and stays as it is", _name(module), name)
        elif before is _Missing:
            del entries[name]
        else:
            entries[name] = before


def _name(value: Any) -> str:
    return type(value).__name__
