"""``BlockAdapter(auto=True)``: finds a transformer's block list by names, and its pattern by signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .pattern import ForwardPattern, fits

__all__ = ["Search", "find_blocks"]


class Search(NamedTuple):
    """What a block list must look like; the fields are those of :class:`cachedit.BlockAdapter`."""

    allow_prefixes: Sequence[str]
    check_prefixes: bool
    allow_suffixes: Sequence[str]
    check_suffixes: bool
    blocks_policy: str
    check_num_outputs: bool


def find_blocks(transformer: nn.Module, pattern: ForwardPattern | None, search: Search) -> tuple[str, ForwardPattern]:
    """Find the one block list of a transformer that fits.

    Among the lists whose name and blocks the search allows, and whose blocks' signatures fit the pattern, the longest
    (or shortest) is taken.

    Args:
        transformer: The transformer; only its own lists count, not those of its submodules.
        pattern: The list's pattern, or None to read it off the signatures.
        search: What to look for.

    Returns:
        Name of the list, and its pattern.

    Raises:
        ValueError: If no list fits, two lists of one length do, or signatures leave several patterns open.
    """
    if search.blocks_policy not in ("max", "min"):
        raise ValueError(f"blocks_policy must be 'max' or 'min', got {search.blocks_policy!r}")
    fitting: dict[str, list[ForwardPattern]] = {}
    lengths: dict[str, int] = {}
    for name, blocks in transformer.named_children():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0 or not _allowed(name, blocks, search):
            continue
        patterns = [pattern] if pattern else list(ForwardPattern)
        outputs = search.check_num_outputs or pattern is None
        patterns = [p for p in patterns if all(fits(block, p, outputs) for block in blocks)]
        if patterns:
            streams = max(len(p.In) for p in patterns)  # a block that takes both streams hardly ignores one
            fitting[name] = [p for p in patterns if len(p.In) == streams]
            lengths[name] = len(blocks)
    where = f"auto: {type(transformer).__name__}"
    if not fitting:
        lists = [name for name, module in transformer.named_children() if isinstance(module, nn.ModuleList)]
        raise ValueError(
            f"{where} has no block list that fits {pattern.name if pattern else 'any pattern'} and the allowed names; "
            f"its lists are {', '.join(lists) or 'none'}: give blocks and forward_pattern"
        )
    length = max(lengths.values()) if search.blocks_policy == "max" else min(lengths.values())
    chosen = [name for name in fitting if lengths[name] == length]
    if len(chosen) > 1:
        raise ValueError(f"{where} has {len(chosen)} lists of {length} blocks: give blocks, of {', '.join(chosen)}")
    patterns = fitting[chosen[0]]
    if len(patterns) > 1:
        names = ", ".join(p.name for p in patterns)
        raise ValueError(f"{where}: the signature of the blocks in {chosen[0]} fits {names}: give forward_pattern")
    return chosen[0], patterns[0]


def _allowed(name: str, blocks: nn.ModuleList, search: Search) -> bool:
    if search.check_prefixes and not name.startswith(tuple(search.allow_prefixes)):
        return False
    return not search.check_suffixes or type(blocks[0]).__name__.endswith(tuple(search.allow_suffixes))
