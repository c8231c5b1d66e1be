"""Forecasters: how much each stored residual weighs in the forecast of a reused step.

Every forecaster is a function from step numbers to weights; no tensor is touched here. The engine stores the residual
of each computed step in a ring and hands the weights to ``cachedit_kernels.residual_forecast``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .config import CalibratorConfig, TaylorSeerCalibratorConfig

__all__ = ["Forecaster", "Reuse", "TaylorSeer", "make_forecaster", "taylor_weights"]


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
    count = min(order + 1, len(steps))
    elapsed = step - steps[0]
    # ladder[j] is the current rung, as seen at computed step j (0 is the newest), over the residuals.
    ladder = [[1.0 if k == j else 0.0 for k in range(count)] for j in range(count)]
    weights = ladder[0]
    factor = 1.0
    for i in range(1, count):
        ladder = [
            [(now - before) / (steps[j] - steps[j + 1]) for now, before in zip(ladder[j], ladder[j + 1], strict=True)]
            for j in range(count - i)
        ]
        factor *= elapsed / i
        weights = [weight + factor * rung for weight, rung in zip(weights, ladder[0], strict=True)]
    return weights + [0.0] * (len(steps) - count)


def make_forecaster(config: CalibratorConfig | None) -> Forecaster:
    """Build the forecaster that a calibrator configuration asks for (None: plain reuse)."""
    if isinstance(config, TaylorSeerCalibratorConfig) and config.enable_calibrator:
        return TaylorSeer(config.taylorseer_order)
    return Reuse()
