"""residual_forecast (E4M3 too) and ring_gram against eager torch, torch.compile, a peer and a copy of the same bytes.

K = 1 is plain reuse, K = 2 a first-order forecast, K = 3 a second-order one: ours as a weighted sum of K residuals,
the others from a derivative ladder, as TaylorSeer (arXiv 2503.06923) is usually written. The rows of ring_gram are
what fits to 4 and to 6 residuals take; the eager form is one matrix product in float32.

    python benchmarks/bench_forecast.py --mb 1 16 64 256 --dtype bfloat16 float32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import cachedit_kernels
from common import Case, run_sizes


def cases(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    hidden = torch.randn(shape, device=device).to(dtype)
    for k in (1, 2, 3):
        ring = torch.randn((k, *shape), device=device).to(dtype)
        others = ladder_forecast(hidden, ring), peer_forecast(hidden, ring)
        floor = (k + 2) * hidden.nbytes
        yield Case("residual_forecast", dtype, {"k": k}, floor, ours(hidden, ring), *others)
        codes, scales = ring.to(torch.float8_e4m3fn), ring[..., 0].float().contiguous()
        floor = 2 * hidden.nbytes + codes.nbytes + scales.nbytes
        others = (eager_float8(hidden, codes, scales),)
        yield Case("residual_forecast_float8", dtype, {"k": k}, floor, ours(hidden, codes, [scales]), *others)
    for k in (4, 6):
        ring = torch.randn((k, *shape), device=device).to(dtype)
        yield Case("ring_gram", dtype, {"k": k}, ring.nbytes, gram(ring), eager_gram(ring))


WEIGHTS = [1.5, -0.5, 0.25]


def ours(hidden: Tensor, ring: Tensor, scales: list[Tensor] | None = None) -> Callable[[], object]:
    weights = WEIGHTS[: len(ring)]
    return lambda: cachedit_kernels.residual_forecast([hidden], [ring], weights, scales=scales)


def eager_float8(hidden: Tensor, codes: Tensor, scales: Tensor) -> Callable[[], Tensor]:
    """hidden + sum_k weights[k] * codes[k] * scales[k], one term after another."""

    def forecast() -> Tensor:
        total = hidden
        for k in range(len(codes)):
            total = total + (WEIGHTS[k] * codes[k].to(hidden.dtype) * scales[k, ..., None]).to(hidden.dtype)
        return total

    return forecast


def gram(ring: Tensor) -> Callable[[], object]:
    return lambda: cachedit_kernels.ring_gram([ring])


def eager_gram(ring: Tensor) -> Callable[[], Tensor]:
    def multiply() -> Tensor:
        rows = ring.flatten(1).float()
        return rows @ rows.mT

    return multiply


def ladder_forecast(hidden: Tensor, derivatives: Tensor, dt: float = 1.0) -> Callable[[], Tensor]:
    """hidden + sum_i derivatives[i] * dt**i / i!, one term after another."""

    def forecast() -> Tensor:
        residual = derivatives[0]
        for i in range(1, len(derivatives)):
            residual = residual + derivatives[i] * (dt**i / math.factorial(i))
        return hidden + residual

    return forecast


def peer_forecast(hidden: Tensor, derivatives: Tensor) -> Callable[[], Tensor] | None:
    """cache_dit's approximation of the residual, then its addition to the hidden states."""
    try:
        from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState
    except ImportError:
        return None
    state = TaylorSeerState(n_derivatives=len(derivatives) - 1)
    for _ in range(4):  # until the ladder is full
        state.mark_step_begin()
        state.update(derivatives[0])
    state.mark_step_begin()
    return lambda: hidden + state.approximate()


if __name__ == "__main__":
    run_sizes(__doc__, cases)
