"""The definition of rows in E4M3, in plain torch, for every device and float dtype.

The scale of a row (the last dimension) is amax / 448, rounded to float32, where amax is the largest magnitude in it but
for NaN, and never less than the smallest normal number, so that rows of zeros (and of what nearly is zero) divide
like others. A code is E4M3(x / scale): the division is rounded to float32, the quotient to the nearest E4M3 number,
to even between two, and to +-448 beyond. NaN becomes the code NaN; a row with an infinity has an infinite scale, and
comes back as NaN throughout, as E4M3 knows no infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] in E4M3 codes, and their float32 scales [...]."""
    wide = x.float()
    magnitude = wide.abs().nan_to_num(nan=0.0, posinf=torch.inf)
    amax = magnitude.amax(-1) if x.shape[-1] > 0 else magnitude.sum(-1)
    scales = (amax / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    quotient = wide / scales.unsqueeze(-1)
    return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scales  # the cast itself saturates in some versions only


def from_e4m3(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """code * scale, in float32 (float64 for float64), rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes.to(wide) * scales.to(wide).unsqueeze(-1)).to(dtype)
