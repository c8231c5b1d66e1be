"""Stored residuals of one stretch of blocks: a ring per stream, and the operators that fill it and forecast from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import cachedit_kernels as kernels

from .calibrator import CalibratorConfig
from .forecast import FittedForecaster, make_forecaster

__all__ = ["ResidualStore", "add_up", "allocate", "forecast_streams", "read_back"]


class ResidualStore:
    """What a stretch of blocks added to its streams at the last K computed steps.

    Streams are ``[hidden_states]`` or ``[hidden_states, encoder_hidden_states]``. ``rings`` holds one buffer
    ``[K, *shape]`` per stream; it is allocated when the first step is stored and written in place from then on.
    With ``float8`` they hold E4M3 codes, and ``scales`` a buffer ``[K, *shape[:-1]]`` per stream.

    Args:
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
        group: Ranks that hold the other pieces of the streams.
        float8: Hold residuals (or outputs) in E4M3.
    """

    def __init__(self, calibrator_config: CalibratorConfig | None, group: Any = None, float8: bool = False):
        self.group = group
        self.float8 = float8
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
        self.release()

    def forget(self) -> None:
        """Drop what is stored; buffers stay allocated."""
        self.steps: list[int] = []  # computed steps whose residuals are stored, newest first
        self.fits: list[Callable[[int], list[float]]] | None = None  # per stream, until the next residual is stored
        self.next_slot = 0

    def release(self) -> None:
        """Drop the buffers as well."""
        self.rings: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] | None = None
        self.forget()

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Rings, and their scales where they have any."""
        return [*self.rings, *(self.scales or ())]

    @property
    def bytes_held(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def push(self, step: int, streams: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Keep the residual (or the outputs) of a computed step: ``rings[next_slot] = outputs - streams``."""
        self.write(self.next_slot, streams, outputs)
        self.note(step)

    def write(self, slot: int | torch.Tensor, streams: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """What :meth:`push` does to the buffers. The slot may be a 0-d int64 tensor on their device."""
        if not self.rings:
            dtype = torch.float8_e4m3fn if self.float8 else None
            self.rings = [allocate(self.slots, tensor, dtype) for tensor in outputs]
            if self.float8:
                self.scales = [allocate(self.slots, tensor[..., 0], torch.float32) for tensor in outputs]
        # An output is what is added to nothing.
        before = [
            output.new_zeros(()).expand_as(output) if kept else stream
            for stream, output, kept in zip(streams, outputs, self.keeps_outputs, strict=False)
        ]
        kernels.residual_push(before, outputs, self.rings, slot, self.scales)

    def note(self, step: int) -> None:
        """The residual of this step is in the next slot."""
        self.fits = None
        self.steps = [step, *self.steps[: self.slots - 1]]
        self.next_slot = (self.next_slot + 1) % self.slots

    def forecast(self, step: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """Forecast the outputs of a reused step from its inputs: ``streams + sum_k weights[k] * rings[k]``."""
        return self._forecast(self.weigh(step, len(streams)), streams)

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

    def weights(self, step: int) -> list[list[float]]:
        """By slot: the weights of a forecast that is not fitted, and of the last residual as it is."""
        common = self.forecaster.weights(self.steps, step)
        return [self._slot_weights(common, False), self._slot_weights(common, True)]

    def forecast_by(self, weights: torch.Tensor, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """What :meth:`forecast` does with the buffers, given :meth:`weights` as a float32 tensor ``[2, K]``."""
        return self._forecast(self.rows(weights, len(streams)), streams)

    def rows(self, weights: torch.Tensor, streams: int) -> list[torch.Tensor]:
        """What of :meth:`weights` forecasts each stream, or one row for all."""
        plain = self.plain[:streams]
        kinds = plain[:1] if plain[0] == plain[-1] else plain
        return [weights[int(p)] for p in kinds]

    def _forecast(
        self, weights: Sequence[Sequence[float] | torch.Tensor], streams: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        return forecast_streams(streams, self.rings, weights, self.keeps_outputs, self.scales)

    def _fitted(self, fitter: FittedForecaster, step: int, plain: tuple[bool, ...]) -> list[list[float]]:
        """Weights of each stream, fitted at the first reused step after a computed one.

        That step waits for the device once more, for the inner products of all streams together.
        """
        fitted = [i for i, p in enumerate(plain) if not p]
        if self.fits is None:
            slots = [(self.next_slot - 1 - age) % self.slots for age in range(fitter.window(self.steps))]
            self.fits = []
            if fitted:
                rings = [self.rings[i] for i in fitted]
                grams = kernels.ring_gram(rings, slots, scales=self._scales_of(fitted))
                self.fits = [fitter.fit(self.steps, gram) for gram in read_back(add_up(grams, self.group))]
        fits = iter(self.fits)
        return [[1.0] if p else next(fits)(step) for p in plain]

    def _scales_of(self, streams: list[int]) -> list[torch.Tensor] | None:
        return None if self.scales is None else [self.scales[i] for i in streams]

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


def forecast_streams(
    streams: list[torch.Tensor],
    rings: list[torch.Tensor],
    weights: Sequence[Sequence[float] | torch.Tensor],
    keeps_outputs: tuple[bool, bool],
    scales: list[torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Forecast streams from their rings: in one launch where one row of weights, by slot, serves them all.

    An input does not count in its forecast where outputs are kept in place of residuals.
    """
    base = [0.0 if kept else 1.0 for kept in keeps_outputs]
    if len(weights) == 1:
        return kernels.residual_forecast(streams, rings, weights[0], base[0], scales)
    return [
        kernels.residual_forecast([stream], [rings[i]], row, base[i], scales and [scales[i]])[0]
        for i, (stream, row) in enumerate(zip(streams, weights, strict=True))
    ]


def add_up(sums: torch.Tensor, group: Any) -> torch.Tensor:
    """Sums over the pieces of all ranks of a group, in one collective; None is this rank alone."""
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    return sums


def read_back(numbers: torch.Tensor) -> list[Any]:
    """The tensor's numbers; waits for the device, and for no more of its work than leads to them."""
    if not numbers.is_cuda:
        return numbers.tolist()
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)  # torch keeps such memory for the next time
    host.copy_(numbers, non_blocking=True)
    torch.cuda.current_stream(numbers.device).record_event().synchronize()
    return host.tolist()


def allocate(slots: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an uninitialised ring ``[slots, *like.shape]``, of the same dtype if none is given."""
    # A buffer made under inference_mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty((slots, *like.shape), dtype=dtype or like.dtype, device=like.device)
