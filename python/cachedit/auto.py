"""Which block lists of a transformer that nobody has described may be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .pattern import ForwardPattern

__all__ = ["Search"]

MINIMUM = 3  # blocks: shorter lists are not worth caching


class Search(NamedTuple):
    """What a block list must look like; the fields are those of :class:`cachedit.BlockAdapter`, where not said."""

    allow_prefixes: tuple[str, ...] = ()
    check_prefixes: bool = False
    allow_suffixes: tuple[str, ...] = ()
    check_suffixes: bool = False
    blocks_policy: str = "max"
    pattern: ForwardPattern | None = None
    """The pattern that is expected, if any."""

    def candidates(self, transformer: nn.Module) -> list[tuple[str, nn.ModuleList]]:
        """Return the lists that may be looked at, by their dotted names.

        Raises:
            ValueError: If there is none, or ``blocks_policy`` is unknown.
        """
        if self.blocks_policy not in ("max", "min"):
            raise ValueError(f"blocks_policy must be 'max' or 'min', got {self.blocks_policy!r}")
        lists = dict(_block_lists(transformer))
        allowed = [(name, blocks) for name, blocks in lists.items() if self._allows(name, blocks)]
        if not allowed:
            raise ValueError(
                f"{type(transformer).__name__} is not in the model table, and has no list of {MINIMUM} or more blocks "
                f"to look at (its lists are {', '.join(lists) or 'none'}); describe its blocks with "
                "BlockAdapter(transformer=..., blocks=..., forward_pattern=...)"
            )
        return allowed

    def _allows(self, name: str, blocks: nn.ModuleList) -> bool:
        if self.check_prefixes and not name.rpartition(".")[2].startswith(self.allow_prefixes):
            return False
        return not self.check_suffixes or type(blocks[0]).__name__.endswith(self.allow_suffixes)


def _block_lists(transformer: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in transformer.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= MINIMUM:
            yield name, module
