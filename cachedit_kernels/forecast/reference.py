"""The definition of `residual_forecast`, in plain torch, for every device and float dtype.

Arithmetic is in float32, as in residual/reference.py; float64 inputs stay float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachedit_kernels.float8.reference import from_e4m3


def residual_forecast(
    hidden: Sequence[Tensor], ring: Sequence[Tensor], weights: Tensor | Sequence[float], base: float = 1.0
) -> list[Tensor]:
    """Per stream: base * hidden + sum_k weights[k] * ring[k], terms added in the order of k, rounded once.

    A term whose factor is exactly zero is left out, so that a slot never written (or a hidden state that is not
    wanted) cannot spoil the result with the NaN or inf that it may hold.
    """
    outputs = []
    for h, r in zip(hidden, ring, strict=True):
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        factors = torch.as_tensor(weights, dtype=wide, device=h.device)
        scale = torch.tensor(base, dtype=wide).item()  # what float32 makes of it decides whether it is zero
        total = h.to(wide) * scale if scale != 0 else torch.zeros_like(h, dtype=wide)
        for k in range(r.shape[0]):
            factor = factors[..., k]
            if factor.dim() == 1:  # per sample
                factor = factor.reshape(-1, *(1 for _ in h.shape[1:]))
            total = torch.where(factor == 0, total, total + factor * r[k].to(wide))
        outputs.append(total.to(h.dtype).contiguous())
    return outputs


def residual_forecast_float8(
    hidden: Sequence[Tensor],
    ring: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    base: float,
    scales: Sequence[Tensor],
) -> list[Tensor]:
    """The same from rings in E4M3."""
    wide = [torch.float64 if h.dtype == torch.float64 else torch.float32 for h in hidden]
    return residual_forecast(hidden, list(map(from_e4m3, ring, scales, wide)), weights, base)
