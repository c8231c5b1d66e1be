"""`residual_l1`, `l1` and `residual_push` (also in E4M3): schemas, fakes and the functions that users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachedit_kernels import _checks
from cachedit_kernels._library import define


def residual_l1(
    before: Sequence[Tensor], after: Sequence[Tensor], anchor: Sequence[Tensor], per_sample: bool = False
) -> Tensor:
    """How far the residual of each stream has moved from its anchor, all streams in one launch.

    Per stream: `sum |(after - before) - anchor|` and `sum |anchor|`. Their quotient is the relative L1 distance of
    TeaCache (arXiv 2411.19108), of residuals; sums are returned instead, because sums of shards can be added.

    Args:
        before: S tensors, what went into the blocks. float32, float16 or bfloat16, any shape and strides.
        after: S tensors, what came out, each with the shape, dtype and device of its `before`.
        anchor: S tensors, the residual to compare with, likewise.
        per_sample: sums for each sample (index of dimension 0, equal in all streams) instead of for the whole tensor.

    Returns:
        float32 [S, 2], or [S, B, 2] per sample. NaN and inf pass through. Equal inputs give equal bits.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return _residual_l1(before, after, anchor, per_sample)  # type: ignore[no-any-return]


def l1(previous: Sequence[Tensor], current: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """How far each stream has moved since `previous`, all streams in one launch.

    Per stream: `sum |previous - current|` and `sum |previous|`, whose quotient is TeaCache's relative L1 distance.

    Args:
        previous: S tensors, float32, float16 or bfloat16, any shape and strides.
        current: S tensors, each with the shape, dtype and device of its `previous`.
        per_sample: sums for each sample (index of dimension 0, equal in all streams) instead of for the whole tensor.

    Returns:
        float32 [S, 2], or [S, B, 2] per sample. NaN and inf pass through. Equal inputs give equal bits.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    return _l1(previous, current, per_sample)  # type: ignore[no-any-return]


def residual_push(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    ring: Sequence[Tensor],
    slot: Tensor | int,
    scales: Sequence[Tensor] | None = None,
) -> None:
    """Stores each stream's residual, `ring[slot] = after - before`, rounded once, all streams in one launch.

    With `scales`, residuals are stored in E4M3 (arXiv 2209.05433): every row (the last dimension, a token) as codes
    `E4M3((after - before) / scale)` with a scale that takes its largest magnitude to 448. The residual is not rounded
    before that. A row with NaN keeps its other values, one with an infinity becomes NaN.

    Args:
        before: S tensors, float32, float16 or bfloat16, any shape and strides.
        after: S tensors, each with the shape, dtype and device of its `before`.
        ring: S tensors [K, *shape] of the stream's dtype, each slot contiguous, written in place. May share memory
            neither with `before` or `after` nor with each other.
        slot: which of the K slots: an int, or (for compiled and captured use) a 0-d integer tensor on the same device.
            A tensor's value is checked on CPU only.
        scales: S tensors [K, *shape[:-1]], float32, each slot contiguous, written in place like the rings, which are
            float8_e4m3fn then. None for rings of the stream's dtype.

    Raises:
        RuntimeError: naming the argument, what was expected and what came; nothing has been written then.
    """
    if scales is not None:
        push_float8 = _residual_push_float8 if isinstance(slot, Tensor) else _residual_push_float8_int
        push_float8(before, after, ring, slot, scales)
    elif isinstance(slot, Tensor):
        _residual_push(before, after, ring, slot)
    else:
        _residual_push_int(before, after, ring, slot)


def _residual_l1_fake(
    before: list[Tensor], after: list[Tensor], anchor: list[Tensor], per_sample: bool = False
) -> Tensor:
    _checks.residual_l1(before, after, anchor, per_sample)
    return _empty_sums(before, per_sample)


def _l1_fake(previous: list[Tensor], current: list[Tensor], per_sample: bool = False) -> Tensor:
    _checks.l1(previous, current, per_sample)
    return _empty_sums(previous, per_sample)


def _empty_sums(streams: list[Tensor], per_sample: bool) -> Tensor:
    shape = (len(streams), streams[0].shape[0], 2) if per_sample else (len(streams), 2)
    return streams[0].new_empty(shape, dtype=torch.float32)


_residual_l1 = define(
    "residual_l1(Tensor[] before, Tensor[] after, Tensor[] anchor, bool per_sample=False) -> Tensor", _residual_l1_fake
)
_l1 = define("l1(Tensor[] previous, Tensor[] current, bool per_sample=False) -> Tensor", _l1_fake)
_residual_push = define(
    "residual_push(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, Tensor slot) -> ()", _checks.residual_push
)
_residual_push_int = define(
    "residual_push.int(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, int slot) -> ()", _checks.residual_push
)
_residual_push_float8 = define(
    "residual_push_float8(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, Tensor slot, Tensor(b!)[] scales) -> ()",
    _checks.residual_push_float8,
)
_residual_push_float8_int = define(
    "residual_push_float8.int(Tensor[] before, Tensor[] after, Tensor(a!)[] ring, int slot, Tensor(b!)[] scales) -> ()",
    _checks.residual_push_float8,
)
