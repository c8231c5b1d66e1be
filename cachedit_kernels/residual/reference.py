"""The definition of `residual_l1`, `l1` and `residual_push` (also in E4M3), in plain torch.

Works on every device and for every float dtype. Arithmetic is in float32, sums are added up in float64 and rounded
once; float64 inputs stay float64 throughout, which is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachedit_kernels.float8.reference import to_e4m3


def residual_l1(
    before: Sequence[Tensor], after: Sequence[Tensor], anchor: Sequence[Tensor], per_sample: bool = False
) -> Tensor:
    """Per stream: sum |(after - before) - anchor| and sum |anchor|. Shape [S, 2], per sample [S, B, 2]."""
    rows = []
    for b, a, c in zip(map(_widen, before), map(_widen, after), map(_widen, anchor), strict=True):
        rows.append(_two_sums((a - b) - c, c, per_sample))
    return torch.stack(rows)


def l1(previous: Sequence[Tensor], current: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """Per stream: sum |previous - current| and sum |previous|. Shape [S, 2], per sample [S, B, 2]."""
    rows = []
    for p, c in zip(map(_widen, previous), map(_widen, current), strict=True):
        rows.append(_two_sums(p - c, p, per_sample))
    return torch.stack(rows)


def residual_push(
    before: Sequence[Tensor], after: Sequence[Tensor], ring: Sequence[Tensor], slot: Tensor | int
) -> None:
    """Per stream: ring[slot] = after - before, rounded once to the ring's dtype."""
    for b, a, r in zip(before, after, ring, strict=True):
        _write(r, slot, (_widen(a) - _widen(b)).to(r.dtype))


def residual_push_float8(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    ring: Sequence[Tensor],
    slot: Tensor | int,
    scales: Sequence[Tensor],
) -> None:
    """Per stream: ring[slot], scales[slot] = after - before in E4M3."""
    for b, a, r, s in zip(before, after, ring, scales, strict=True):
        codes, row_scales = to_e4m3(_widen(a) - _widen(b))
        _write(r.view(torch.uint8), slot, codes.view(torch.uint8))  # nothing is indexed in E4M3
        _write(s, slot, row_scales)


def _write(ring: Tensor, slot: Tensor | int, value: Tensor) -> None:
    if isinstance(slot, Tensor):
        ring.index_copy_(0, slot.reshape(1).long(), value.unsqueeze(0))  # does not wait for the device
    else:
        ring[slot].copy_(value)


def _two_sums(difference: Tensor, scale: Tensor, per_sample: bool) -> Tensor:
    def total(x: Tensor) -> Tensor:
        dims = tuple(range(1, x.dim())) if per_sample else tuple(range(x.dim()))
        x = x.abs().to(torch.float64)
        return x.sum(dims) if dims else x  # sum(()) would sum over every dimension

    return torch.stack([total(difference), total(scale)], dim=-1).to(difference.dtype)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
