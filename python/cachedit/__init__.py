"""cachedit: diffusion transformers, faster, by not computing what hardly changes between denoising steps.

The thin engine over ``cachedit_kernels``. Start with :func:`enable_cache`.
"""

from typing import Any

from cachedit_kernels import __version__

from .adapter import BlockAdapter
from .api import (
    disable_cache,
    drop_request,
    enable_cache,
    enable_cuda_graphs,
    limit_requests,
    refresh_context,
    request,
    summary,
)
from .attention import set_attn_backend
from .cache_types import block_range, cache_type
from .calibrator import (
    CalibratorConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from .config import BasicCacheConfig, CacheType, DBCacheConfig, DBPruneConfig, PolicyConfig
from .estimate import MemoryEstimate, estimate_memory
from .load import (
    load_attn_backend_config,
    load_cache_config,
    load_configs,
    load_options,
    load_parallelism_config,
    load_quantize_config,
)
from .mask import steps_mask
from .modifier import ParamsModifier
from .parallel import ParallelismBackend, ParallelismConfig
from .patch_functor import PatchFunctor
from .pattern import ForwardPattern
from .plot import plot_summary
from .policy import Decision, StepPolicy, StepView
from .quantization import QuantizeBackend, QuantizeConfig, quantize
from .register import BlockAdapterRegister, get_adapter, supported_matrix, supported_pipelines
from .stats import CacheStats
from .tag import strify
from .teacache import TeaCacheConfig

NONE, DBCache, DBPrune = CacheType.NONE, CacheType.DBCache, CacheType.DBPrune
Pattern_0, Pattern_1, Pattern_2, Pattern_3, Pattern_4, Pattern_5 = ForwardPattern

__all__ = [
    "NONE",
    "BasicCacheConfig",
    "BlockAdapter",
    "BlockAdapterRegister",
    "CacheStats",
    "CacheType",
    "CalibratorConfig",
    "DBCache",
    "DBCacheConfig",
    "DBPrune",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "Decision",
    "FoCaCalibratorConfig",
    "ForwardPattern",
    "HermiteCalibratorConfig",
    "MemoryEstimate",
    "ParallelismBackend",
    "ParallelismConfig",
    "ParamsModifier",
    "PatchFunctor",
    "Pattern_0",
    "Pattern_1",
    "Pattern_2",
    "Pattern_3",
    "Pattern_4",
    "Pattern_5",
    "PolicyConfig",
    "QuantizeBackend",
    "QuantizeConfig",
    "StepPolicy",
    "StepView",
    "TaylorSeerCalibratorConfig",
    "TeaCacheConfig",
    "__version__",
    "block_range",
    "cache_type",
    "disable_cache",
    "drop_request",
    "enable_cache",
    "enable_cuda_graphs",
    "estimate_memory",
    "get_adapter",
    "limit_requests",
    "load_attn_backend_config",
    "load_cache_config",
    "load_configs",
    "load_options",
    "load_parallelism_config",
    "load_quantize_config",
    "plot_summary",
    "quantize",
    "refresh_context",
    "request",
    "set_attn_backend",
    "steps_mask",
    "strify",
    "summary",
    "supported_matrix",
    "supported_pipelines",
]

# Names of cache_dit for work that this version does not do.
_LATER = {
    "SVDQuant": ("load",),
    "compilation": ("set_compile_configs",),
    "profiling": (
        "ProfilerContext",
        "create_profiler_context",
        "get_profiler_output_dir",
        "profile_function",
        "set_profiler_output_dir",
    ),
    "layerwise offloading": (
        "LayerwiseOffloadHandle",
        "LayerwiseOffloadHandleGroup",
        "get_layerwise_offload_handles",
        "layerwise_cpu_offload",
        "layerwise_offload",
        "remove_layerwise_offload",
    ),
}


def __getattr__(name: str) -> Any:
    for work, names in _LATER.items():
        if name in names:
            # Not an AttributeError: `from cachedit import layerwise_offload` would lose the message.
            raise ImportError(f"cachedit.{name} is not available in this version yet: {work}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
