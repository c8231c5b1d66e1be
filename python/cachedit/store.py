"""Stored residuals of one stretch of blocks: a ring per stream, and the operators that fill it and forecast from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import cachedit_kernels as kernels

from .calibrator import CalibratorConfig
from .forecast import FittedForecaster, make_forecaster

__all__ = ["ResidualStore", "add_up", "allocate"]


class ResidualStore:
    """What a stretch of blocks added to its streams at the last K computed steps.

    Streams are ``[hidden_states]`` or ``[hidden_states, encoder_hidden_states]``. ``rings`` holds one buffer
    ``[K, *shape]`` per stream; it is allocated when the first step is stored and written in place from then on.

    Args:
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
        group: Ranks that hold the other pieces of the streams.
    """

    def __init__(self, calibrator_config: CalibratorConfig | None, group: Any = None):
        self.group = group
        self.forecaster = make_forecaster(calibrator_config)
        self.slots = self.forecaster.slots
        self.fitter = self.forecaster if isinstance(self.forecaster, FittedForecaster) else None
        # Per stream: whether its last residual is reused as it is, and whether outputs are kept in place of residuals.
        self.plain = (True, True)
        self.keeps_outputs = (False, False)
        if calibrator_config is not None:
            calibrated = (calibrator_config.enable_calibrator, calibrator_config.enable_encoder_calibrator)
            outputs = calibrator_config.calibrator_cache_type != "residual"
            self.plain = (not calibrated[0], not calibrated[1])
            self.keeps_outputs = (outputs and calibrated[0], outputs and calibrated[1])
        self.rings: list[torch.Tensor] = []
        self.forget()

    def forget(self) -> None:
        """Drop what is stored; buffers stay allocated."""
        self.steps: list[int] = []  # computed steps whose residuals are stored, newest first
        self.fits: list[Callable[[int], list[float]]] | None = None  # per stream, until the next residual is stored
        self.next_slot = 0

    def release(self) -> None:
        """Drop the buffers as well."""
        self.rings = []
        self.forget()

    @property
    def bytes_held(self) -> int:
        """Bytes of the buffers."""
        return sum(ring.nbytes for ring in self.rings)

    def push(self, step: int, streams: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Keep the residual of a computed step: ``rings[next_slot] = outputs - streams``."""
        if not self.rings:
            self.rings = [allocate(self.slots, tensor) for tensor in outputs]
        slot = self.next_slot
        residual = [i for i in range(len(outputs)) if not self.keeps_outputs[i]]
        for i in range(len(outputs)):
            if self.keeps_outputs[i]:
                self.rings[i][slot].copy_(outputs[i])
        if len(residual) == len(outputs):
            kernels.residual_push(streams, outputs, self.rings, slot)
        elif residual:
            i = residual[0]
            kernels.residual_push(streams[i : i + 1], outputs[i : i + 1], self.rings[i : i + 1], slot)
        self.fits = None
        self.steps = [step, *self.steps[: self.slots - 1]]
        self.next_slot = (slot + 1) % self.slots

    def forecast(self, step: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """Forecast the outputs of a reused step from its inputs: ``streams + sum_k weights[k] * rings[k]``."""
        weights = self.weigh(step, len(streams))
        if len(weights) == 1:
            return kernels.residual_forecast(streams, self.rings, weights[0], self.base(0))
        return [
            kernels.residual_forecast([stream], [ring], row, self.base(i))[0]
            for i, (stream, ring, row) in enumerate(zip(streams, self.rings, weights, strict=True))
        ]

    def weigh(self, step: int, streams: int) -> list[list[float]]:
        """Return the weights of a forecast by slot: one row per stream, or one for all where they do not differ."""
        fitter, plain = self.fitter, self.plain[:streams]
        if fitter is not None and fitter.window(self.steps) > 0:
            weights = self._fitted(fitter, step, plain)
        else:
            common = self.forecaster.weights(self.steps, step)
            if plain[0] == plain[-1]:
                return [self._slot_weights(common, plain[0])]
            weights = [common] * streams
        return [self._slot_weights(row, p) for row, p in zip(weights, plain, strict=True)]

    def base(self, stream: int) -> float:
        """How much a stream's input counts in its forecast: not at all where outputs are kept."""
        return 0.0 if self.keeps_outputs[stream] else 1.0

    def _fitted(self, fitter: FittedForecaster, step: int, plain: tuple[bool, ...]) -> list[list[float]]:
        """Weights of each stream, fitted at the first reused step after a computed one.

        That step waits for the device once more, for the inner products of all streams together.
        """
        rings = [ring for ring, p in zip(self.rings, plain, strict=True) if not p]
        if self.fits is None:
            slots = [(self.next_slot - 1 - age) % self.slots for age in range(fitter.window(self.steps))]
            grams = add_up(kernels.ring_gram(rings, slots), self.group).tolist() if rings else []
            self.fits = [fitter.fit(self.steps, gram) for gram in grams]
        fits = iter(self.fits)
        return [[1.0] if p else next(fits)(step) for p in plain]

    def _slot_weights(self, weights: list[float], plain: bool) -> list[float]:
        """Newest-first weights, put in the order of the slots; unused slots weigh 0 and are not read."""
        slots = self.slots
        if plain:
            weights = [1.0]
        if slots == 1:
            return weights
        by_slot = [0.0] * slots
        slot = self.next_slot
        for weight in weights:
            slot = (slot or slots) - 1
            by_slot[slot] = weight
        return by_slot


def add_up(sums: torch.Tensor, group: Any) -> torch.Tensor:
    """Sums over the pieces of all ranks of a group, in one collective; None is this rank alone."""
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    return sums


def allocate(slots: int, like: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised ring ``[slots, *like.shape]``."""
    # A buffer made under inference_mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty((slots, *like.shape), dtype=like.dtype, device=like.device)
