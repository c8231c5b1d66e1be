"""Short tags of what is enabled, for file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .api import summary
from .config import CacheType
from .load import load_configs
from .stats import CacheStats

__all__ = ["strify"]


def strify(adapter_or_others: Any) -> str:
    """Return a short tag of the cache's settings, such as ``DBCache_F1B0_W8I1M0MC0_R0.12_T1O1_S16``.

    Args:
        adapter_or_others: A pipeline, transformer or adapter; what :func:`summary` returns, or one entry of it; or a
            configuration as a dictionary, as :func:`load_configs` takes it.

    Returns:
        The tags of the cache configuration and of the calibrator (``T0O0`` without one); after ``P`` the percentage of
        blocks that were pruned, with DBPrune; after ``S`` how many steps were reused, where any. Numbers are those of
        the conditional (or only) branch, and with several transformers or block lists those of the first. An empty
        string where no cache is enabled or configured.
    """
    if isinstance(adapter_or_others, Mapping):
        no_cache = str(adapter_or_others.get("cache_type")) == CacheType.NONE.value
        stats = [CacheStats(cache_options={} if no_cache else load_configs(adapter_or_others))]
    elif isinstance(adapter_or_others, CacheStats):
        stats = [adapter_or_others]
    elif isinstance(adapter_or_others, list):
        stats = adapter_or_others
        for entry in stats:
            if not isinstance(entry, CacheStats):
                raise TypeError(f"adapter_or_others must hold what summary returned, got {type(entry).__name__}")
    else:
        stats = summary(adapter_or_others, logging=False)
    first = stats[0] if stats else CacheStats()
    config, calibrator = first.cache_options.get("cache_config"), first.cache_options.get("calibrator_config")
    if config is None or config.cache_type is CacheType.NONE:
        return ""
    tags = [config.strify()]
    if first.pruned_ratio is not None:
        tags.append(f"P{round(first.pruned_ratio * 100, 2)}")
    tags.append(calibrator.strify() if calibrator else "T0O0")
    if first.cached_steps:
        tags.append(f"S{len(first.cached_steps)}")
    return "_".join(tags)
