"""Schedules of steps as the engine carries them out, with differences that are given rather than measured."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch

from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig, store
from cachedit.context import SectionState
from cachedit.policy import Decision

# What happens before a step, or to it; as in tests/native/policy.cpp.
RESTART, RELEASE, STREAMS_CHANGED, NOT_STORED, STEP_SKIPPED = 1, 2, 4, 8, 16  # as in tests/native/policy.cpp


class Played:
    """A metric that has been measured beforehand."""

    bytes_held = 0

    def __init__(self, diffs: list[float]):
        self.diffs = diffs
        self.position = 0

    def measure(self, seen: Any) -> float:
        return self.diffs[self.position]

    def keep(self, seen: Any, computed: bool) -> None: ...

    def forget(self) -> None: ...

    def release(self) -> None: ...


class Operators:
    """Stands in for the operators, and notes which slot and weights they were given."""

    slot: int | None = None
    weights: list[float] | None = None

    def residual_push(self, before: Any, after: Any, ring: Any, slot: int, scales: Any = None) -> None:
        self.slot = slot

    def residual_forecast(self, hidden: Any, ring: Any, weights: list[float], base: float, scales: Any = None) -> Any:
        self.weights = weights
        return hidden


def by_the_engine(
    settings: dict[str, Any], total: int | None, order: int, diffs: list[float], events: list[int]
) -> tuple[list[Any], int]:
    """Carry the schedule out; per step (step, reused, diff, reason, slot pushed to, weights by slot)."""
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    state = SectionState(DBCacheConfig(**settings), calibrator)
    state.metric = played = Played(diffs)
    state.begin(total)
    shapes = itertools.cycle((torch.empty(1), torch.empty(2)))
    streams = [next(shapes)]
    rows = []
    with mock.patch.object(store, "kernels", Operators()) as operators:
        for i, event in enumerate(events):
            played.position = i
            if event & STEP_SKIPPED:
                state.policy.step += 1
            if event & RESTART:
                state.forget()
            if event & RELEASE:
                state.release()
            if event & STREAMS_CHANGED:
                streams = [next(shapes)]
            operators.slot = operators.weights = None
            decision, diff = state.decide(None, streams)
            if decision is Decision.REUSE:
                state.forecast(streams, diff)
            elif event & NOT_STORED:
                state.skip_storing(diff)
            else:
                state.store(streams, streams, diff)
            record = state.policy.records[-1]
            rows.append((record.step, record.reused, diff, record.reason, operators.slot, operators.weights))
    return rows, state.policy.nonfinite
