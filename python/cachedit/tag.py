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
        The tags of the cache configuration and of the calibrator (``T0O0`` without one), and after ``S`` how many steps
        the conditional (or only) branch reused, where any. Several transformers or block lists: those of the first.
        An empty string where no cache is enabled or configured.
    """
    if isinstance(adapter_or_others, Mapping):
        no_cache = str(adapter_or_others.get("cache_type")) == CacheType.NONE.value
        options, reused = {} if no_cache else load_configs(adapter_or_others), 0
    else:
        stats = adapter_or_others
        if not isinstance(stats, (CacheStats, list)):
            stats = summary(stats, logging=False)
        first = next(iter(stats), None) if isinstance(stats, list) else stats
        options, reused = (first.cache_options, len(first.cached_steps)) if first else ({}, 0)
    config, calibrator = options.get("cache_config"), options.get("calibrator_config")
    if config is None or config.cache_type is CacheType.NONE:
        return ""
    tags = [config.strify(), calibrator.strify() if calibrator else "T0O0", f"S{reused}" if reused else ""]
    return "_".join(filter(None, tags))
