"""State of one branch of one request: what is stored, since which steps, and the operators that use it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import cachedit_kernels as kernels

from .config import BasicCacheConfig, CalibratorConfig
from .forecast import FittedForecaster, Reuse, make_forecaster
from .policy import Decision, Policy

__all__ = ["SectionState", "StreamSpec"]

logger = logging.getLogger(__name__)


class StreamSpec(NamedTuple):
    """What buffers are laid out for."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StreamSpec:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {str(self.dtype).removeprefix('torch.')} on {self.device}"


class SectionState:
    """Ring of residuals, anchor and policy of one section (block lists that share a decision) on one branch.

    Streams are ``[hidden_states]`` or ``[hidden_states, encoder_hidden_states]``. Buffers are allocated when the first
    step is stored, once per shape, and written in place from then on:

    - ``rings``: per stream ``[K, *shape]``, the body's residuals (or outputs) at the last K computed steps;
    - ``anchor``: ``shape``, the head's residual of hidden_states at the last computed step.

    Args:
        config: Validated cache configuration.
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
    """

    def __init__(self, config: BasicCacheConfig, calibrator_config: CalibratorConfig | None):
        self.config = config
        self.forecaster = make_forecaster(calibrator_config)
        self.slots = self.forecaster.slots
        self.fitter = self.forecaster if isinstance(self.forecaster, FittedForecaster) else None
        plain_encoder = calibrator_config is not None and not calibrator_config.enable_encoder_calibrator
        self.encoder_forecaster = Reuse() if plain_encoder and self.slots > 1 else None
        self.keeps_outputs = calibrator_config is not None and calibrator_config.calibrator_cache_type != "residual"
        self.base = 0.0 if self.keeps_outputs else 1.0
        self.specs: list[StreamSpec] | None = None
        self.rings: list[torch.Tensor] = []
        self.anchor: torch.Tensor | None = None
        self.anchor_ring: torch.Tensor | None = None  # the same memory, as a ring of one slot
        self.begin(None)

    def begin(self, total_steps: int | None) -> None:
        """Start a request: forget what is stored and the statistics; buffers stay allocated."""
        self.policy = Policy(self.config, total_steps)
        self.forget()

    def forget(self) -> None:
        """Drop what is stored, keep statistics and buffers: the next step is computed."""
        self.fits: list[Callable[[int], list[float]]] | None = None  # per stream, until the next residual is stored
        self.steps: list[int] = []  # computed steps whose residuals are stored, newest first
        self.next_slot = 0
        self.has_anchor = False
        self.policy.restart()

    @property
    def bytes_held(self) -> int:
        """Bytes of the buffers."""
        held = [*self.rings, *([] if self.anchor is None else [self.anchor])]
        return sum(buffer.numel() * buffer.element_size() for buffer in held)

    # One step: decide(), then either forecast() or store().

    def decide(self, before: torch.Tensor, streams: list[torch.Tensor]) -> tuple[Decision, float | None]:
        """Decide the step; the only place that waits for the device, and only if the difference is needed.

        Args:
            before: hidden_states as the first head block got it.
            streams: The body's inputs; ``streams[0]`` is hidden_states after the head.
        """
        policy = self.policy
        if policy.refresh_due():
            self.forget()
        self._check_streams(streams)
        decision = policy.plan()
        diff = None
        if decision is Decision.MEASURE:
            diff = self._difference(before, streams[0])
            decision = policy.decide(diff)
        if decision is Decision.COMPUTE:
            # From here on the step is half stored; an exception in the body must not leave it to be reused.
            policy.stored = False
            if policy.measures:
                self._store_anchor(before, streams[0])
        return decision, diff

    def forecast(self, streams: list[torch.Tensor], diff: float | None) -> list[torch.Tensor]:
        """Forecast the body's outputs from its inputs: ``streams + sum_k weights[k] * rings[k]``."""
        policy = self.policy
        if self.fitter is not None and self.fitter.window(self.steps) > 0:
            out = self._forecast_fitted(self.fitter, streams)
            policy.record(Decision.REUSE, diff)
            return out
        weights = self._slot_weights(self.forecaster.weights(self.steps, policy.step))
        if self.encoder_forecaster is None:
            out = kernels.residual_forecast(streams, self.rings, weights, self.base)
        else:
            plain = self._slot_weights(self.encoder_forecaster.weights(self.steps, policy.step))
            out = kernels.residual_forecast(streams[:1], self.rings[:1], weights, self.base)
            out += kernels.residual_forecast(streams[1:], self.rings[1:], plain, self.base)
        policy.record(Decision.REUSE, diff)
        return out

    def _forecast_fitted(self, fitter: FittedForecaster, streams: list[torch.Tensor]) -> list[torch.Tensor]:
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
            weights = self.fits[i](self.policy.step) if i < fitted else [1.0]
            out += kernels.residual_forecast([stream], [self.rings[i]], self._slot_weights(weights), self.base)
        return out

    def store(self, streams: list[torch.Tensor], outputs: list[torch.Tensor], diff: float | None) -> None:
        """Keep the residual of a computed step: ``rings[next_slot] = outputs - streams``."""
        if not self.rings:
            self.rings = [self._allocate(self.slots, tensor) for tensor in outputs]
        slot = self.next_slot
        if self.keeps_outputs:
            for ring, output in zip(self.rings, outputs, strict=True):
                ring[slot].copy_(output)
        else:
            kernels.residual_push(streams, outputs, self.rings, slot)
        self.fits = None
        self.steps = [self.policy.step, *self.steps[: self.slots - 1]]
        self.next_slot = (slot + 1) % self.slots
        self.policy.record(Decision.COMPUTE, diff)

    def skip_storing(self, diff: float | None = None) -> None:
        """Take note of a computed step whose residual could not be stored."""
        self.policy.record(Decision.COMPUTE, diff, stored=False)

    def _difference(self, before: torch.Tensor, after: torch.Tensor) -> float:
        """``sum |(after - before) - anchor| / sum |anchor|`` in fp32."""
        if not self.has_anchor or self.anchor is None:
            return math.inf
        moved: float
        size: float
        moved, size = kernels.residual_l1([before], [after], [self.anchor]).tolist()[0]
        if size == 0.0:
            return 0.0 if moved == 0.0 else math.inf
        return moved / size

    def _store_anchor(self, before: torch.Tensor, after: torch.Tensor) -> None:
        if self.anchor_ring is None:
            self.anchor_ring = self._allocate(1, after)
            self.anchor = self.anchor_ring[0]
        kernels.residual_push([before], [after], [self.anchor_ring], 0)
        self.has_anchor = True

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

    def _check_streams(self, streams: list[torch.Tensor]) -> None:
        specs = self.specs
        if specs is not None and len(specs) == len(streams):
            for spec, tensor in zip(specs, streams, strict=True):
                if spec.shape != tensor.shape or spec.dtype != tensor.dtype or spec.device != tensor.device:
                    break
            else:
                return
        new = [StreamSpec.of(tensor) for tensor in streams]
        if specs is not None and self.policy.stored:
            logger.warning(
                "streams changed within a request at step %d, the cache starts afresh: %s, before %s",
                self.policy.step,
                _describe(new),
                _describe(specs),
            )
        self.specs = new
        self.rings = []
        self.anchor = self.anchor_ring = None
        self.forget()

    @staticmethod
    def _allocate(slots: int, like: torch.Tensor) -> torch.Tensor:
        # A buffer made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            return torch.empty((slots, *like.shape), dtype=like.dtype, device=like.device)


def _describe(specs: list[StreamSpec]) -> str:
    names = ("hidden_states", "encoder_hidden_states")
    return "; ".join(f"{name} {spec}" for name, spec in zip(names, specs, strict=False))
