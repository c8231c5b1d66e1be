"""Forecasters: how much each stored residual weighs in the forecast of a reused step.

Every forecaster is a function from step numbers to weights; no tensor is touched here. The engine stores the residual
of each computed step in a ring and hands the weights to ``cachedit_kernels.residual_forecast``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from .calibrator import (
    CalibratorConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    TaylorSeerCalibratorConfig,
)

__all__ = [
    "FittedForecaster",
    "FoCa",
    "Forecaster",
    "Hermite",
    "Reuse",
    "TaylorSeer",
    "foca_weights",
    "hermite_weights",
    "make_forecaster",
    "taylor_weights",
]


class Forecaster(Protocol):
    """Turns the numbers of the stored steps into weights."""

    slots: int
    """Residuals to keep per stream."""

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        """Return one weight per entry of ``steps``.

        Args:
            steps: Computed steps whose residuals are stored, newest first; 1 to ``slots`` entries.
            step: The step to forecast, later than ``steps[0]``.
        """
        ...


@runtime_checkable
class FittedForecaster(Forecaster, Protocol):
    """A forecaster that fits its weights to the residuals themselves, where it has enough of them."""

    def window(self, steps: Sequence[int]) -> int:
        """Return how many of the newest residuals to fit to; 0 where :meth:`weights` is to be used instead."""
        ...

    def fit(self, steps: Sequence[int], gram: Sequence[Sequence[float]]) -> Callable[[int], list[float]]:
        """Fit to the newest ``window(steps)`` residuals of one stream; done once until another one is stored.

        Args:
            steps: As for :meth:`weights`.
            gram: Inner products of these residuals, newest first.

        Returns:
            A function from the step to forecast to one weight per entry of ``gram``.
        """
        ...


class Reuse:
    """The last residual as it is."""

    slots = 1

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        return [1.0]


class TaylorSeer:
    """Taylor expansion around the last computed step, derivatives by finite differences (arXiv 2503.06923).

    Args:
        order: Highest derivative; with fewer than ``order + 1`` residuals stored, as many as there are.
    """

    def __init__(self, order: int):
        self.order = order
        self.slots = order + 1

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        return taylor_weights(steps, step, self.order)


class Hermite:
    """TaylorSeer's derivatives in the scaled Hermite basis of HiCache (arXiv 2508.16984).

    Args:
        order: Highest derivative; with fewer than ``order + 1`` residuals stored, as many as there are.
        sigma: Scale of the basis.
    """

    def __init__(self, order: int, sigma: float):
        self.order = order
        self.sigma = sigma
        self.slots = order + 1

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        return hermite_weights(steps, step, self.order, self.sigma)


class FoCa:
    """FoCa's forecast (arXiv 2508.16211), from the four last computed steps.

    FoCa builds on its own forecasts, so strictly each one depends on every computed step before it. A reused step's
    share in the next run's forecasts is 0.57 at most and mostly a half or less, so that what lies more than three
    computed steps back hardly counts; two computed steps in a row cut it off altogether.
    """

    slots = 4

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        return foca_weights(steps, step)


def taylor_weights(steps: Sequence[int], step: int, order: int) -> list[float]:
    """Weights of the stored residuals in a TaylorSeer forecast.

    TaylorSeer keeps a ladder of derivatives, each rung the difference of the rung above at the last two computed
    steps, divided by the gap between them. The ladder is linear in the residuals, so it is built here for unit vectors:
    ``forecast = sum_i elapsed**i / i! * d_i`` becomes ``sum_k weights[k] * residual[k]``.

    Args:
        steps: Computed steps, newest first, strictly decreasing.
        step: The step to forecast.
        order: Highest derivative.

    Returns:
        One weight per entry of ``steps``; they sum to 1.
    """
    elapsed = step - steps[0]
    return _combine(_derivatives(steps, order), [elapsed**i / math.factorial(i) for i in range(order + 1)])


def hermite_weights(steps: Sequence[int], step: int, order: int, sigma: float) -> list[float]:
    """Weights of the stored residuals in a HiCache forecast.

    The derivatives are TaylorSeer's, the powers of the elapsed steps give way to scaled Hermite polynomials:
    ``forecast = sum_i sigma**i * H_i(sigma * elapsed) / i! * d_i`` with the physicists'
    ``H_0 = 1, H_1(x) = 2x, H_(i+1)(x) = 2x H_i(x) - 2i H_(i-1)(x)``.

    Args:
        steps: Computed steps, newest first, strictly decreasing.
        step: The step to forecast.
        order: Highest derivative.
        sigma: Scale of the basis.

    Returns:
        One weight per entry of ``steps``; they sum to 1.
    """
    x = sigma * (step - steps[0])
    hermite = [1.0, 2.0 * x]
    for i in range(1, order):
        hermite.append(2.0 * x * hermite[i] - 2.0 * i * hermite[i - 1])
    factors = [sigma**i * hermite[i] / math.factorial(i) for i in range(order + 1)]
    return _combine(_derivatives(steps, order), factors)


FOCA_HORIZON = 3


def foca_weights(steps: Sequence[int], step: int) -> list[float]:
    """Weights of the stored residuals in a FoCa forecast.

    FoCa steps from the last computed value ``F`` by the mean of two slopes, that between the last two computed values
    and that between the last two values of any kind, forecasts included:
    ``P = F + elapsed / 2 * ((F - F_before) + (last - last_but_one))``. Slopes are differences of values, whatever the
    distance of their steps, and beyond 3 steps the change is that of 3 steps times ``3 / elapsed``. With one computed
    value it is reused as it is. All of this is linear in the computed values, so the recursion runs over weights here.

    Args:
        steps: Computed steps, newest first, strictly decreasing. All steps in between were forecast. The recursion
            starts at the oldest one.
        step: The step to forecast.

    Returns:
        One weight per entry of ``steps``; they sum to 1.
    """
    count = len(steps)
    values = [[1.0 if k == i else 0.0 for k in range(count)] for i in range(count)]
    if count == 1:
        return values[0]
    last = values[-1]  # forecasts from a single value are that value, and leave no trace
    for i in range(count - 2, -1, -1):
        computed, before = values[i], values[i + 1]
        last, last_but_one = computed, last
        until = steps[i - 1] - 1 if i > 0 else step
        for elapsed in range(1, until - steps[i] + 1):
            horizon = min(elapsed, FOCA_HORIZON)
            factor = horizon / 2 if elapsed <= FOCA_HORIZON else horizon / 2 * (horizon / elapsed)
            forecast = [
                f + factor * ((f - b) + (one - two))
                for f, b, one, two in zip(computed, before, last, last_but_one, strict=True)
            ]
            last, last_but_one = forecast, last
    return last


def _derivatives(steps: Sequence[int], order: int) -> list[list[float]]:
    """TaylorSeer's derivatives at ``steps[0]``, orders 0 and up, each as weights of the residuals.

    Row i of the ladder's rung j is the i-th derivative as seen at computed step j (0 is the newest).
    """
    count = min(order + 1, len(steps))
    ladder = [[1.0 if k == j else 0.0 for k in range(len(steps))] for j in range(count)]
    derivatives = [ladder[0]]
    for i in range(1, count):
        ladder = [
            [(now - before) / (steps[j] - steps[j + 1]) for now, before in zip(ladder[j], ladder[j + 1], strict=True)]
            for j in range(count - i)
        ]
        derivatives.append(ladder[0])
    return derivatives


def _combine(derivatives: list[list[float]], factors: list[float]) -> list[float]:
    terms = list(zip(factors, derivatives, strict=False))  # early on there are fewer derivatives than factors
    return [sum(factor * derivative[k] for factor, derivative in terms) for k in range(len(derivatives[0]))]


def make_forecaster(config: CalibratorConfig | None) -> Forecaster:
    """Build the forecaster that a calibrator configuration asks for (None: plain reuse)."""
    if config is None or not (config.enable_calibrator or config.enable_encoder_calibrator):
        return Reuse()
    if isinstance(config, TaylorSeerCalibratorConfig):
        return TaylorSeer(config.taylorseer_order)
    if isinstance(config, HermiteCalibratorConfig):
        return Hermite(config.hermite_order, config.hermite_sigma)
    if isinstance(config, FoCaCalibratorConfig):
        return FoCa()
    if isinstance(config, DMDCalibratorConfig):
        from .dmd import DMD  # it needs torch, which nothing else here does

        return DMD(config.dmd_history, config.dmd_rank, config.dmd_ridge)
    return Reuse()
