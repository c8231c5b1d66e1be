"""cachedit: diffusion transformers, faster, by not computing what hardly changes between denoising steps.

The thin engine over ``cachedit_kernels``. Start with :func:`enable_cache`.
"""

from cachedit_kernels import __version__

from .adapter import BlockAdapter
from .api import (
    disable_cache,
    drop_request,
    enable_cache,
    limit_requests,
    refresh_context,
    request,
    summary,
)
from .config import (
    BasicCacheConfig,
    CacheType,
    CalibratorConfig,
    DBCacheConfig,
    DBPruneConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    PolicyConfig,
    TaylorSeerCalibratorConfig,
)
from .estimate import MemoryEstimate, estimate_memory
from .load import load_cache_config, load_configs, load_options
from .mask import steps_mask
from .modifier import ParamsModifier
from .pattern import ForwardPattern
from .plot import plot_summary
from .policy import Decision, StepPolicy, StepView
from .stats import CacheStats
from .teacache import TeaCacheConfig

__all__ = [
    "BasicCacheConfig",
    "BlockAdapter",
    "CacheStats",
    "CacheType",
    "CalibratorConfig",
    "DBCacheConfig",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "Decision",
    "FoCaCalibratorConfig",
    "ForwardPattern",
    "HermiteCalibratorConfig",
    "MemoryEstimate",
    "ParamsModifier",
    "PolicyConfig",
    "StepPolicy",
    "StepView",
    "TaylorSeerCalibratorConfig",
    "TeaCacheConfig",
    "__version__",
    "disable_cache",
    "drop_request",
    "enable_cache",
    "estimate_memory",
    "limit_requests",
    "load_cache_config",
    "load_configs",
    "load_options",
    "plot_summary",
    "refresh_context",
    "request",
    "steps_mask",
    "summary",
]
