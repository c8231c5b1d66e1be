"""`residual_forecast`: schemas, fake and the function that users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachedit_kernels import _checks
from cachedit_kernels._library import define


def residual_forecast(
    hidden: Sequence[Tensor],
    ring: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    base: float = 1.0,
    scales: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Forecasts each stream from its stored residuals, `base * hidden + sum_k weights[k] * ring[k]`, in one launch.

    Forecasts that are linear in what is stored are all of this form, TaylorSeer's (arXiv 2503.06923) among them: its
    ladder of finite differences comes to a weight per residual. Terms are accumulated in float32 and rounded once. A
    slot whose weight is exactly 0 is not read, so it may be uninitialised memory; nor is `hidden` where `base` is 0.
    With `scales`, rings are in E4M3 (see `residual_push`).

    Args:
        hidden: S tensors, float32, float16 or bfloat16, any shape and strides.
        ring: S tensors [K, *shape] of the stream's dtype, any strides.
        weights: K floats, or (for compiled and captured use) a float32 tensor [K], or [B, K] with one row per sample
            (index of dimension 0), on the same device.
        base: factor of `hidden`; 0.0 where the ring holds hidden states rather than residuals.
        scales: S tensors [K, *shape[:-1]], float32, where the rings are float8_e4m3fn; each slot of both contiguous.

    Returns:
        S new contiguous tensors, each with the shape and dtype of its `hidden`. NaN and inf pass through.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    if scales is not None:
        forecast_float8 = _forecast_float8 if isinstance(weights, Tensor) else _forecast_float8_floats
        return forecast_float8(hidden, ring, weights, base, scales)  # type: ignore[no-any-return]
    if isinstance(weights, Tensor):
        return _residual_forecast(hidden, ring, weights, base)  # type: ignore[no-any-return]
    return _residual_forecast_floats(hidden, ring, weights, base)  # type: ignore[no-any-return]


def _residual_forecast_fake(
    hidden: list[Tensor], ring: list[Tensor], weights: Tensor | list[float], base: float = 1.0
) -> list[Tensor]:
    _checks.residual_forecast(hidden, ring, weights, base)
    return _empty(hidden)


def _forecast_float8_fake(
    hidden: list[Tensor], ring: list[Tensor], weights: Tensor | list[float], base: float, scales: list[Tensor]
) -> list[Tensor]:
    _checks.residual_forecast_float8(hidden, ring, weights, base, scales)
    return _empty(hidden)


def _empty(hidden: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(h, memory_format=torch.contiguous_format) for h in hidden]


_residual_forecast = define(
    "residual_forecast(Tensor[] hidden, Tensor[] ring, Tensor weights, float base=1.0) -> Tensor[]",
    _residual_forecast_fake,
)
_residual_forecast_floats = define(
    "residual_forecast.floats(Tensor[] hidden, Tensor[] ring, float[] weights, float base=1.0) -> Tensor[]",
    _residual_forecast_fake,
)
_forecast_float8 = define(
    "residual_forecast_float8(Tensor[] hidden, Tensor[] ring, Tensor weights, float base, Tensor[] scales) -> Tensor[]",
    _forecast_float8_fake,
)
_forecast_float8_floats = define(
    "residual_forecast_float8.floats(Tensor[] hidden, Tensor[] ring, float[] weights, float base, Tensor[] scales)"
    " -> Tensor[]",
    _forecast_float8_fake,
)
