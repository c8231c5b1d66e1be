"""`ulysses_pack` and `ulysses_unpack`: schemas, fakes and the functions that users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cachedit_kernels import _checks
from cachedit_kernels._library import define
from cachedit_kernels.ulysses.layout import buffer_bytes, layout


class Quantized(NamedTuple):
    """A tensor [B, L, H, D] as it travels: `codes` (float8_e4m3fn, of its shape) times `scales` (float32 [B, L, H])."""

    codes: Tensor
    scales: Tensor


def ulysses_pack(tensors: Sequence[Tensor], splits: Sequence[int], scatter_dim: int, float8: Sequence[bool]) -> Tensor:
    """Quantises, permutes and packs tensors into one buffer with an aligned block per peer, in one launch.

    The sending side of DeepSpeed-Ulysses' exchanges (arXiv 2309.14509). For Q, K and V, `scatter_dim` is 2: peer p gets
    `splits[p]` of the heads. For O it is 1: peer p gets `splits[p]` tokens. `ulysses/layout.py` says where everything
    lies.

    A tensor travels as it is, or (where `float8` says so) in E4M3 with a float32 scale for each token and head,
    amax / 448. Codes are the correctly rounded quotients, saturating at 448; zeros stay zeros. A NaN stays where it is;
    an infinity makes its token and head NaN. On CPU and on NVIDIA GPUs the codes are the same to the bit.

    Args:
        tensors: T tensors [B, L, H, D] of one shape, dtype and device, float32, float16 or bfloat16, any strides.
        splits: for each peer its size along `scatter_dim`, in order; zero for a peer that gets nothing.
        scatter_dim: 1 (sequence) or 2 (heads).
        float8: for each tensor, whether it is quantised.

    Returns:
        uint8, one dimension. The sizes of its blocks are what `layout()` says.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return _ulysses_pack(tensors, splits, scatter_dim, float8)  # type: ignore[no-any-return]


def ulysses_unpack(
    buffer: Tensor,
    shape: Sequence[int],
    splits: Sequence[int],
    gather_dim: int,
    dtype: torch.dtype,
    float8: Sequence[bool],
    dequantize: bool = True,
) -> list[Tensor | Quantized]:
    """Joins what peers have packed, in one launch: the inverse of the exchange's `ulysses_pack`.

    Args:
        buffer: uint8, contiguous, one dimension: a block from each peer, in order.
        shape: [B, L, H, D] of the results.
        splits: for each peer its size along `gather_dim`, in order.
        gather_dim: 1 (sequence: for Q, K and V) or 2 (heads: for O); the one that peers have not scattered.
        dtype: of the tensors that were packed: float32, float16 or bfloat16.
        float8: for each tensor, whether it was quantised.
        dequantize: False leaves quantised tensors as they are, for attention that takes E4M3.

    Returns:
        T new contiguous tensors of `shape` and `dtype`; in place of quantised ones that stay so, `Quantized`.
        Dequantised values are code * scale, rounded once.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return grouped(_ulysses_unpack(buffer, shape, splits, gather_dim, dtype, float8, dequantize), float8, dequantize)


def grouped(arrays: Sequence[Tensor], float8: Sequence[bool], dequantize: bool) -> list[Tensor | Quantized]:
    """What operators return one after the other, as one per tensor."""
    tensors = iter(arrays)
    return [
        Quantized(next(tensors), next(tensors)) if quantised and not dequantize else next(tensors)
        for quantised in float8
    ]


def _ulysses_pack_fake(tensors: list[Tensor], splits: list[int], scatter_dim: int, float8: list[bool]) -> Tensor:
    _checks.ulysses_pack(tensors, splits, scatter_dim, float8)
    blocks = layout(tensors[0].shape, splits, scatter_dim, tensors[0].element_size(), float8)
    return tensors[0].new_empty(buffer_bytes(blocks), dtype=torch.uint8)


def ulysses_unpack_fake(
    buffer: Tensor,
    shape: list[int],
    splits: list[int],
    gather_dim: int,
    dtype: torch.dtype,
    float8: list[bool],
    dequantize: bool = True,
) -> list[Tensor]:
    _checks.ulysses_unpack(buffer, shape, splits, gather_dim, dtype, float8, dequantize)
    results = []
    for quantised in float8:
        if quantised and not dequantize:
            results.append(buffer.new_empty(shape, dtype=torch.float8_e4m3fn))
            results.append(buffer.new_empty(shape[:3], dtype=torch.float32))
        else:
            results.append(buffer.new_empty(shape, dtype=dtype))
    return results


_ulysses_pack = define(
    "ulysses_pack(Tensor[] tensors, SymInt[] splits, int scatter_dim, bool[] float8) -> Tensor", _ulysses_pack_fake
)
_ulysses_unpack = define(
    "ulysses_unpack(Tensor buffer, SymInt[] shape, SymInt[] splits, int gather_dim, ScalarType dtype, bool[] float8, "
    "bool dequantize=True) -> Tensor[]",
    ulysses_unpack_fake,
)
