"""cachedit: diffusion transformers, faster, by not computing what hardly changes between denoising steps.

The thin engine over ``cachedit_kernels``. Start with :func:`enable_cache`.
"""

from cachedit_kernels import __version__

from .adapter import BlockAdapter
from .api import disable_cache, enable_cache, refresh_context, summary
from .config import (
    BasicCacheConfig,
    CacheType,
    CalibratorConfig,
    DBCacheConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from .load import load_cache_config, load_configs, load_options
from .mask import steps_mask
from .pattern import ForwardPattern
from .stats import CacheStats

__all__ = [
    "BasicCacheConfig",
    "BlockAdapter",
    "CacheStats",
    "CacheType",
    "CalibratorConfig",
    "DBCacheConfig",
    "DMDCalibratorConfig",
    "FoCaCalibratorConfig",
    "ForwardPattern",
    "HermiteCalibratorConfig",
    "TaylorSeerCalibratorConfig",
    "__version__",
    "disable_cache",
    "enable_cache",
    "load_cache_config",
    "load_configs",
    "load_options",
    "refresh_context",
    "steps_mask",
    "summary",
]
