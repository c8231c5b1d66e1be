"""Step computation masks: which denoising steps are computed (1) and which may be reused (0).

Named policies are bins of computed and reused steps for a schedule of 28, scaled to other lengths. The bins and the
scaling rule are those of ``cache_dit``, so that a policy name means the same mask in both packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

__all__ = ["MASK_POLICIES", "check_mask", "steps_mask"]

Bins = tuple[tuple[int, ...], tuple[int, ...]]  # computed steps, reused steps; taken in turn

_BINS_28: dict[str, Bins] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_BINS_10_TO_15: dict[str, Bins] = {
    "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
    "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
    "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
    "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
}
# Few-step (distilled) models: one table per length.
_BINS_SHORT: dict[int, dict[str, Bins]] = {
    4: dict.fromkeys(_BINS_28, ((2, 1), (1,))),
    6: dict.fromkeys(_BINS_28, ((3, 1), (2,))),
    8: {
        "slow": ((5, 1, 1), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
    9: {
        "slow": ((5, 2, 1), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
}

MASK_POLICIES = tuple(_BINS_28)


def steps_mask(
    compute_bins: Sequence[int] | None = None,
    cache_bins: Sequence[int] | None = None,
    total_steps: int | None = None,
    mask_policy: str | None = "medium",
) -> list[int]:
    """Build a step computation mask from explicit bins or from a named policy.

    Args:
        compute_bins: Lengths of the runs of computed steps, first run first. Goes with ``cache_bins``.
        cache_bins: Lengths of the runs of reused steps between them.
        total_steps: Number of denoising steps. Required for a named policy; with bins it may cut them short
            (default: the sum of all bins).
        mask_policy: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``; used when no bins are given. Lengths
            4, 6 and everything from 8 up exist; the last step is always computed.

    Returns:
        A list of ``total_steps`` ones (compute) and zeros (reuse).

    Raises:
        ValueError: For an unknown policy, a length no policy has, or bins that do not reach ``total_steps``.
        TypeError: For lengths that are not integers.

    Example:
        >>> "".join(map(str, steps_mask(total_steps=10, mask_policy="fast")))
        '1110100101'
    """
    if (compute_bins is None) != (cache_bins is None):
        missing = "cache_bins" if cache_bins is None else "compute_bins"
        raise ValueError(f"compute_bins and cache_bins go together, but {missing} is missing")
    if total_steps is not None:
        _check_count("total_steps", total_steps, at_least=1)
    if compute_bins is not None and cache_bins is not None:
        return _from_bins(compute_bins, cache_bins, total_steps)
    if total_steps is None:
        raise ValueError("total_steps is required for a mask_policy")
    if not isinstance(mask_policy, str) or mask_policy not in _BINS_28:
        raise ValueError(f"mask_policy must be one of {', '.join(MASK_POLICIES)}, got {mask_policy!r}")
    mask = _interleave(*_scaled_bins(mask_policy, total_steps))[:total_steps]
    mask[-1] = 1
    return mask


def check_mask(mask: Sequence[int], total_steps: int | None = None, name: str = "steps_computation_mask") -> list[int]:
    """Return ``mask`` as a list of ints after checking that it holds only 0 and 1 and has ``total_steps`` entries."""
    if isinstance(mask, str) or not isinstance(mask, Sequence):
        raise TypeError(f"{name} must be a sequence of 0 and 1, got {type(mask).__name__}")
    if not mask:
        raise ValueError(f"{name} must not be empty")
    for position, value in enumerate(mask):
        if value not in (0, 1):
            raise ValueError(f"{name}[{position}] must be 0 (reuse) or 1 (compute), got {value!r}")
    if total_steps is not None and len(mask) != total_steps:
        raise ValueError(
            f"{name} must have one entry per step: expected {total_steps} (num_inference_steps), got {len(mask)}"
        )
    return [int(value) for value in mask]


def _from_bins(compute_bins: Sequence[int], cache_bins: Sequence[int], total_steps: int | None) -> list[int]:
    for name, bins in (("compute_bins", compute_bins), ("cache_bins", cache_bins)):
        if isinstance(bins, str) or not isinstance(bins, Sequence):
            raise TypeError(f"{name} must be a sequence of integers, got {type(bins).__name__}")
        for position, value in enumerate(bins):
            _check_count(f"{name}[{position}]", value, at_least=0)
    mask = _interleave(compute_bins, cache_bins)
    if not mask:
        raise ValueError("compute_bins and cache_bins must hold at least one step")
    if total_steps is not None and len(mask) < total_steps:
        raise ValueError(f"compute_bins and cache_bins add up to {len(mask)} steps, but total_steps is {total_steps}")
    return mask[:total_steps]


def _interleave(compute: Sequence[int], cache: Sequence[int]) -> list[int]:
    pairs = zip_longest(compute, cache, fillvalue=0)
    return list(chain.from_iterable([1] * computed + [0] * reused for computed, reused in pairs))


def _scaled_bins(policy: str, steps: int) -> tuple[list[int], list[int]]:
    if steps in _BINS_SHORT:
        table = _BINS_SHORT[steps]
    elif steps < 8:
        raise ValueError(
            f"total_steps: named masks exist for 4, 6 and from 8 steps up, got {steps}; "
            "give compute_bins and cache_bins instead"
        )
    else:
        table = _BINS_10_TO_15 if steps < 16 else _BINS_28
    compute, cache = (list(bins) for bins in table[policy])
    if steps > 28:
        _lengthen(compute, cache, steps)
    _shorten(compute, cache, steps)
    return compute, cache


def _lengthen(compute: list[int], cache: list[int], steps: int) -> None:
    """Grow bin after bin, in proportion to its length at 28 steps, until they cover ``steps``."""
    growth = [[max(int(length * (steps / 28 * 0.5)), 1) for length in bins] for bins in (compute, cache)]
    while True:
        for i in range(len(cache)):
            for bins, grow in zip((compute, cache), growth, strict=True):
                bins[i] += grow[i]
                if sum(compute) + sum(cache) >= steps:
                    return
        compute[-1] += 1
        if sum(compute) + sum(cache) >= steps:
            return


def _shorten(compute: list[int], cache: list[int], steps: int) -> None:
    """Take one step from the last reused bin, then one from the last computed bin, until ``steps`` are left."""
    turn, other = cache, compute
    while sum(compute) + sum(cache) > steps:
        while turn and turn[-1] == 0:
            turn.pop()
        if turn:
            turn[-1] -= 1
        turn, other = other, turn


def _check_count(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
