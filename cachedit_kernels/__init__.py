"""Kernels for caching diffusion transformers: measure residuals, store them, forecast from them.

    residual_l1(before, after, anchor, per_sample=False) -> float32 [S, 2] or [S, B, 2]
    l1(previous, current, per_sample=False)              -> float32 [S, 2] or [S, B, 2]
    residual_push(before, after, ring, slot)             -> None, ring[slot] = after - before
    residual_forecast(hidden, ring, weights, base=1.0)   -> list of tensors, base * hidden + sum_k weights[k] * ring[k]
    ring_gram(ring, slots=None, per_sample=False)        -> float32 [S, K, K] or [S, B, K, K]
    merge_attention(out, lse, out2, lse2)                -> (out, lse), attention over both sets of keys
    ulysses_pack(tensors, splits, ...)                   -> one buffer with a block per peer, quantised and permuted
    ulysses_unpack(buffer, shape, splits, ...)           -> list of tensors, from the blocks of all peers
    quantized_all_to_all(q, k, v, group=...)             -> (q, k, v), heads scattered and sequence gathered
    quantized_all_to_all_output(o, group=...)            -> o, sequence scattered and heads gathered

What deals with residuals takes lists with one tensor per stream. The operators are also `torch.ops.cachedit.*`, know
fake tensors and compile. `backends()` tells which implementation serves which device. All names of the engine
(`enable_cache`, `BlockAdapter` and so on) can be imported from here too; they come from the package `cachedit`, loaded
when first used.
"""

from __future__ import annotations

from typing import Any

from cachedit_kernels import _backend
from cachedit_kernels._backend import Backend, backends
from cachedit_kernels.attention import merge_attention
from cachedit_kernels.forecast import residual_forecast
from cachedit_kernels.gram import ring_gram
from cachedit_kernels.residual import l1, residual_l1, residual_push
from cachedit_kernels.ulysses import (
    Quantized,
    quantized_all_to_all,
    quantized_all_to_all_output,
    ulysses_pack,
    ulysses_unpack,
)

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Quantized",
    "backends",
    "l1",
    "merge_attention",
    "quantized_all_to_all",
    "quantized_all_to_all_output",
    "residual_forecast",
    "residual_l1",
    "residual_push",
    "ring_gram",
    "ulysses_pack",
    "ulysses_unpack",
]

_backend.register()


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        import cachedit

        if name in cachedit.__all__:
            return getattr(cachedit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import cachedit

    return sorted({*globals(), *cachedit.__all__})
