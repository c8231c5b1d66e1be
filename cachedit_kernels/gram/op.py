"""`ring_gram`: schema, fake and the function that users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachedit_kernels import _checks
from cachedit_kernels._library import define


def ring_gram(
    ring: Sequence[Tensor],
    slots: Sequence[int] | None = None,
    per_sample: bool = False,
    scales: Sequence[Tensor] | None = None,
) -> Tensor:
    """The inner products between each stream's stored residuals, `sum ring[slots[i]] * ring[slots[j]]`, in one launch.

    Forecasters that fit their weights to the data, as dynamic mode decomposition does, solve small systems with these.
    Slots that are not asked for are not read, so they may be uninitialised memory.

    Args:
        ring: S tensors [K, *shape], float32, float16 or bfloat16, any strides, K equal in all streams, at most 16.
        slots: which slots, and in which order the rows and columns of the result stand for them; all K by default.
        per_sample: a matrix for each sample (index of the dimension behind the slots, equal in all streams) instead of
            for the whole tensor.
        scales: S tensors [K, *shape[:-1]], float32, where the rings are float8_e4m3fn (see `residual_push`); each slot
            of both contiguous.

    Returns:
        float32 [S, k, k] with k = len(slots), or [S, B, k, k] per sample; symmetric to the bit. Long sums are
        accumulated in float64. NaN and inf pass through. Equal inputs give equal bits.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    if scales is not None:
        return _ring_gram_float8(ring, slots, per_sample, scales)  # type: ignore[no-any-return]
    return _ring_gram(ring, slots, per_sample)  # type: ignore[no-any-return]


def _ring_gram_fake(ring: list[Tensor], slots: list[int] | None = None, per_sample: bool = False) -> Tensor:
    _checks.ring_gram(ring, slots, per_sample)
    return _empty(ring, slots, per_sample)


def _ring_gram_float8_fake(
    ring: list[Tensor], slots: list[int] | None, per_sample: bool, scales: list[Tensor]
) -> Tensor:
    _checks.ring_gram_float8(ring, slots, per_sample, scales)
    return _empty(ring, slots, per_sample)


def _empty(ring: list[Tensor], slots: list[int] | None, per_sample: bool) -> Tensor:
    count = ring[0].shape[0] if slots is None else len(slots)
    samples = (ring[0].shape[1],) if per_sample else ()
    return ring[0].new_empty((len(ring), *samples, count, count), dtype=torch.float32)


_ring_gram = define("ring_gram(Tensor[] ring, int[]? slots=None, bool per_sample=False) -> Tensor", _ring_gram_fake)
_ring_gram_float8 = define(
    "ring_gram_float8(Tensor[] ring, int[]? slots, bool per_sample, Tensor[] scales) -> Tensor", _ring_gram_float8_fake
)
