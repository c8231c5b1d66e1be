"""The definition of `merge_attention`, in plain torch, for every device and float dtype.

Arithmetic is in float32, as in residual/reference.py; float64 inputs stay float64 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax-weighted mean of both results, and log(exp(lse) + exp(lse2)); nothing is exponentiated but -|gap|.

    A result of weight zero is left out, whatever it holds; without any, the mean is 0 and its lse -inf.
    """
    decay = torch.exp(-(lse - lse2).abs())  # exp(smaller - larger)
    top = torch.maximum(lse, lse2)
    decay = torch.where(top == -torch.inf, 0.0, decay)
    larger, smaller = 1 / (1 + decay), decay / (1 + decay)
    first = lse >= lse2
    weight = torch.where(lse == -torch.inf, 0.0, torch.where(first, larger, smaller))
    weight2 = torch.where(lse2 == -torch.inf, 0.0, torch.where(first, smaller, larger))
    merged = _weighted(out, weight) + _weighted(out2, weight2)
    return merged.to(out.dtype).contiguous(), (top + torch.log1p(decay)).contiguous()


def _weighted(out: Tensor, weight: Tensor) -> Tensor:
    factor = weight.unsqueeze(-1)
    return torch.where(factor == 0, 0.0, factor * out.to(weight.dtype))
