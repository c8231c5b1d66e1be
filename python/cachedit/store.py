"""Stored residuals of one stretch of blocks: a ring per stream, and the operators that fill it and forecast from it."""

from __future__ import annotations

from collections.abc import Callable

import torch

import cachedit_kernels as kernels

from .config import CalibratorConfig
from .forecast import FittedForecaster, Reuse, make_forecaster

__all__ = ["ResidualStore", "allocate"]


class ResidualStore:
    """What a stretch of blocks added to its streams at the last K computed steps.

    Streams are ``[hidden_states]`` or ``[hidden_states, encoder_hidden_states]``. ``rings`` holds one buffer
    ``[K, *shape]`` per stream; it is allocated when the first step is stored and written in place from then on.

    Args:
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
    """

    def __init__(self, calibrator_config: CalibratorConfig | None):
        self.forecaster = make_forecaster(calibrator_config)
        self.slots = self.forecaster.slots
        self.fitter = self.forecaster if isinstance(self.forecaster, FittedForecaster) else None
        plain_encoder = calibrator_config is not None and not calibrator_config.enable_encoder_calibrator
        self.encoder_forecaster = Reuse() if plain_encoder and self.slots > 1 else None
        self.keeps_outputs = calibrator_config is not None and calibrator_config.calibrator_cache_type != "residual"
        self.base = 0.0 if self.keeps_outputs else 1.0
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
        if self.keeps_outputs:
            for ring, output in zip(self.rings, outputs, strict=True):
                ring[slot].copy_(output)
        else:
            kernels.residual_push(streams, outputs, self.rings, slot)
        self.fits = None
        self.steps = [step, *self.steps[: self.slots - 1]]
        self.next_slot = (slot + 1) % self.slots

    def forecast(self, step: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """Forecast the outputs of a reused step from its inputs: ``streams + sum_k weights[k] * rings[k]``."""
        if self.fitter is not None and self.fitter.window(self.steps) > 0:
            return self._forecast_fitted(self.fitter, step, streams)
        weights = self._slot_weights(self.forecaster.weights(self.steps, step))
        if self.encoder_forecaster is None:
            return kernels.residual_forecast(streams, self.rings, weights, self.base)
        plain = self._slot_weights(self.encoder_forecaster.weights(self.steps, step))
        out = kernels.residual_forecast(streams[:1], self.rings[:1], weights, self.base)
        return out + kernels.residual_forecast(streams[1:], self.rings[1:], plain, self.base)

    def _forecast_fitted(self, fitter: FittedForecaster, step: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each stream with weights of its own, fitted at the first reused step after a computed one.

        That step waits for the device once more, for the inner products of all streams together.
        """
        fitted = 1 if self.encoder_forecaster is not None else len(streams)
        if self.fits is None:
            slots = [(self.next_slot - 1 - age) % self.slots for age in range(fitter.window(self.steps))]
            grams = kernels.ring_gram(self.rings[:fitted], slots).tolist()
            self.fits = [fitter.fit(self.steps, gram) for gram in grams]
        out = []
        for i, stream in enumerate(streams):
            weights = self.fits[i](step) if i < fitted else [1.0]
            out += kernels.residual_forecast([stream], [self.rings[i]], self._slot_weights(weights), self.base)
        return out

    def _slot_weights(self, weights: list[float]) -> list[float]:
        """Newest-first weights, put in the order of the slots; unused slots weigh 0 and are not read."""
        slots = self.slots
        if slots == 1:
            return weights
        by_slot = [0.0] * slots
        slot = self.next_slot
        for weight in weights:
            slot = (slot or slots) - 1
            by_slot[slot] = weight
        return by_slot


def allocate(slots: int, like: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised ring ``[slots, *like.shape]``."""
    # A buffer made under inference_mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty((slots, *like.shape), dtype=like.dtype, device=like.device)
