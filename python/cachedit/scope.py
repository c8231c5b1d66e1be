"""Which request and which guidance branch the running thread, or asyncio task, works on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["DEFAULT", "Scope", "branch_names", "scopes"]

T = TypeVar("T")

DEFAULT: Hashable = object()  # key of the request that runs outside of ``cachedit.request``


class Scope(NamedTuple):
    """A request, and its number of steps where that was given."""

    key: Hashable = DEFAULT
    total_steps: int | None = None


class Table(Generic[T]):
    """One value per controller, set for the inside of a ``with`` block."""

    def __init__(self, name: str):
        self.values: ContextVar[Mapping[Any, T]] = ContextVar(name, default=MappingProxyType({}))

    def get(self, controller: Any) -> T | None:
        """The value, or None outside."""
        return self.values.get().get(controller)

    @contextmanager
    def entry(self, controller: Any, value: T) -> Iterator[None]:
        """Inside, the controller has this value."""
        token = self.values.set({**self.values.get(), controller: value})
        try:
            yield
        finally:
            self.values.reset(token)


scopes: Table[Scope] = Table("cachedit_scopes")  # from ``cachedit.request``
branch_names: Table[str] = Table("cachedit_branch_names")  # from ``cache_context``
