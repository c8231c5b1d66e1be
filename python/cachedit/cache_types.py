"""Names of cache types as users write them, and block numbers."""

from __future__ import annotations

from .config import CacheType

__all__ = ["block_range", "cache_type"]

_ALIASES = {
    "NONE": ("NONE", "NO_CACHE", "NOCACHE", "NC"),
    "DBCache": ("DUAL_BLOCK_CACHE", "DB_CACHE", "DBCACHE", "DB"),
    "DBPrune": ("DYNAMIC_BLOCK_PRUNE", "DB_PRUNE", "DBPRUNE", "DBP"),
    "TeaCache": ("TEACACHE", "TEA_CACHE"),
}


def cache_type(type_hint: CacheType | str | None) -> CacheType:
    """Return the cache type that a name stands for; upper and lower case are the same, None is ``CacheType.NONE``.

    Raises:
        ValueError: For a name that stands for none.
        TypeError: For something else than a name.
    """
    if type_hint is None:
        return CacheType.NONE
    if isinstance(type_hint, CacheType):
        return type_hint
    if not isinstance(type_hint, str):
        raise TypeError(f"type_hint must be a CacheType or a name, got {type_hint!r}")
    for member, aliases in _ALIASES.items():
        if type_hint.upper() in aliases:
            return CacheType(member)
    known = ", ".join(alias for aliases in _ALIASES.values() for alias in aliases)
    raise ValueError(f"type_hint must be one of {known}, got {type_hint!r}")


def block_range(start: int, end: int, step: int = 1) -> list[int]:
    """Return block numbers from ``start`` to ``end`` (exclusive) at distances of ``step``, with 0 and ``end - 1``.

    Meant for ``DBPruneConfig(non_prune_block_ids=...)``, so ranges that keep every block (a ``step`` of 1 or less) or
    none (``end`` of 0 or less, or below ``start``) are empty.
    """
    if start > end or end <= 0 or step <= 1:
        return []
    return sorted({0, *range(start, end, step), end - 1})
