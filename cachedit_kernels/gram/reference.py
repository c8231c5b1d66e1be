"""The definition of `ring_gram`, in plain torch, for every device and float dtype.

Products and sums are in float64 and rounded once to float32; float64 inputs stay float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cachedit_kernels.float8.reference import from_e4m3


def ring_gram(ring: Sequence[Tensor], slots: Sequence[int] | None = None, per_sample: bool = False) -> Tensor:
    """Per stream: sum ring[slots[i]] * ring[slots[j]]. Shape [S, k, k], per sample [S, B, k, k]."""
    grams = []
    for r in ring:
        used = torch.tensor(range(r.shape[0]) if slots is None else slots, dtype=torch.int64, device=r.device)
        samples = r.shape[1] if per_sample else 1
        rows = r.index_select(0, used).double()  # the other slots are not read
        rows = rows.reshape(len(used), samples, math.prod(r.shape[1 + per_sample :]))
        gram = torch.einsum("ibn,jbn->bij", rows, rows).to(torch.float64 if r.dtype == torch.float64 else torch.float32)
        grams.append(gram if per_sample else gram[0])
    return torch.stack(grams)


def ring_gram_float8(
    ring: Sequence[Tensor], slots: Sequence[int] | None, per_sample: bool, scales: Sequence[Tensor]
) -> Tensor:
    """The same of rings in E4M3, every element rounded to float32 first."""
    return ring_gram([from_e4m3(r, s, torch.float32) for r, s in zip(ring, scales, strict=True)], slots, per_sample)
