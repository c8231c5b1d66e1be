"""State of one section on one branch of a request: its policy, what it is measured by, and its stored residuals."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .calibrator import CalibratorConfig
from .config import BasicCacheConfig
from .metric import HeadResidual, Measured, Metric, SignalChange
from .policy import Decision, Policy
from .store import ResidualStore
from .teacache import TeaCacheConfig

if TYPE_CHECKING:
    from .device_steps import DeviceSteps
    from .tap import Tap

__all__ = ["SectionState", "State", "StreamSpec"]

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


class State:
    """What the states of all kinds of caching have in common.

    Args:
        config: Validated cache configuration.
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
        group: Ranks that hold the other pieces of the streams, and decide alike.
    """

    def __init__(self, config: BasicCacheConfig, calibrator_config: CalibratorConfig | None, group: Any = None):
        self.config = config
        self.calibrator_config = calibrator_config
        self.group = group
        self.specs: list[StreamSpec] | None = None
        self.device: DeviceSteps | None = None  # decides the steps, since it was set

    @property
    def policy(self) -> Policy:
        """The request's policy. Where the device decides, this waits for it, and the host goes on from there."""
        if self.device is not None:
            self.take_back()
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy, self.device = policy, None

    @property
    def step(self) -> int:
        """The step to come; known without waiting for the device."""
        return self._policy.step

    @step.setter
    def step(self, step: int) -> None:
        self._policy.step = step

    @property
    def has_run(self) -> bool:
        """Whether the request has had a step here; known without waiting for the device."""
        return self.device is not None or bool(self._policy.records)

    def take_back(self) -> None:
        """Take note of what the device has decided; the policy decides the next step, until it is set again."""
        raise NotImplementedError

    def begin(self, total_steps: int | None) -> None:
        """Start a request: forget what is stored and the statistics; buffers stay allocated."""
        self.policy = self.make_policy(total_steps)
        self.forget()

    def make_policy(self, total_steps: int | None) -> Policy:
        """Return the policy of a request."""
        return self.config.make_policy(total_steps)

    def forget(self) -> None:
        """Drop what is stored, keep statistics and buffers: the next step is computed."""
        self.policy.restart()

    def release(self) -> None:
        """Drop the buffers: the next step is computed, later ones are decided as before."""
        self.specs = None
        self.policy.stored = False

    @property
    def bytes_held(self) -> int:
        """Bytes of the buffers."""
        raise NotImplementedError

    def check_streams(self, streams: list[torch.Tensor]) -> None:
        """Start afresh, and say so within a request, where shapes, dtypes, devices or the number of streams changed."""
        specs = self.specs
        if specs is not None and len(specs) == len(streams):
            for spec, tensor in zip(specs, streams, strict=True):
                if spec.shape != tensor.shape or spec.dtype != tensor.dtype or spec.device != tensor.device:
                    break
            else:
                return
        new = [StreamSpec.of(tensor) for tensor in streams]
        started = self.policy.stored
        self.release()
        self.specs = new
        if started:
            assert specs is not None
            logger.warning(
                "streams changed within a request at step %d, the cache starts afresh: %s, before %s",
                self.policy.step,
                _describe(new),
                _describe(specs),
            )
            origin = self.policy.origin
            self.forget()
            self.policy.origin = origin  # the request goes on: mask and warm-up do not start over


class SectionState(State):
    """DBCache's state: the body between head and tail is reused as a whole.

    Args:
        config: Validated cache configuration.
        calibrator_config: Validated calibrator configuration, or None for plain reuse.
        tap: TeaCache's, if that is what decides.
        group: Ranks that hold the other pieces of the streams, and decide alike.
    """

    def __init__(
        self,
        config: BasicCacheConfig,
        calibrator_config: CalibratorConfig | None,
        tap: Tap | None = None,
        group: Any = None,
    ):
        super().__init__(config, calibrator_config, group)
        self.residuals = ResidualStore(calibrator_config, group, config.residual_float8)
        self.tap = tap
        self.metric: Metric = HeadResidual(group) if tap is None else SignalChange(group)
        self.borrows_from: SectionState | None = None  # another branch, whose difference of the same step serves here
        self.begin(None)

    def make_policy(self, total_steps: int | None) -> Policy:
        if self.tap is not None and isinstance(self.config, TeaCacheConfig):
            return self.tap.make_policy(self.config, total_steps)
        return super().make_policy(total_steps)

    def forget(self) -> None:
        super().forget()
        self.residuals.forget()
        self.metric.forget()

    def release(self) -> None:
        super().release()
        self.residuals.release()
        self.metric.release()

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What is kept from step to step."""
        return [*self.residuals.buffers, *self.metric.buffers]

    @property
    def bytes_held(self) -> int:
        return self.residuals.bytes_held + self.metric.bytes_held

    def note(self, decision: Decision, diff: float | None) -> None:
        """Take note of a step whose buffers something else than this object has read or written."""
        policy = self._policy
        if decision is Decision.COMPUTE:
            self.residuals.note(policy.step)
            self.metric.known = policy.measures
        policy.record(decision, diff)

    def take_back(self) -> None:
        device, self.device = self.device, None
        assert device is not None
        policy = self._policy
        step = policy.step
        for record in device.control.records():
            policy.step = record.step
            if policy.refresh_due():
                self.forget()
            policy.reason = record.reason
            if record.diff is not None and not math.isfinite(record.diff):
                policy.nonfinite += 1
                self.residuals.forget()
            self.note(Decision.REUSE if record.reused else Decision.COMPUTE, record.diff)
        policy.step = step

    # One step: decide(), then either forecast() or store().

    def decide(self, seen: Measured, streams: list[torch.Tensor]) -> tuple[Decision, float | None]:
        """Decide the step; the only place that waits for the device, and only if the difference is needed.

        Args:
            seen: What the step is measured by.
            streams: The body's inputs; ``streams[0]`` is hidden_states after the head.
        """
        policy = self.policy
        if policy.refresh_due():
            self.forget()
        self.check_streams(streams)
        decision = policy.plan()
        diff = None
        if decision is Decision.MEASURE:
            diff = self.metric.measure(seen) if self.borrows_from is None else _diff_of(self.borrows_from, policy.step)
            decision = policy.decide(diff)
            if diff is not None and not math.isfinite(diff):
                self.residuals.forget()  # what is stored may be as bad, and forecasts weigh several steps
        computed = decision is Decision.COMPUTE
        if computed:
            # From here on the step is half stored; an exception in the body must not leave it to be reused.
            policy.stored = False
        if policy.measures and self.borrows_from is None:
            self.metric.keep(seen, computed)
        return decision, diff

    def decide_unseen(self) -> Decision:
        """Decide a step of a static mask, whose outcome depends on nothing that the step shows."""
        if self.policy.refresh_due():
            self.forget()
        decision = self.policy.plan()
        if decision is Decision.COMPUTE:
            self.policy.stored = False
        return decision

    def weigh(self, diff: float | None) -> list[list[float]]:
        """In place of :meth:`forecast`: return what the stored residuals weigh in it (:meth:`ResidualStore.weigh`)."""
        weights = self.residuals.weigh(self.policy.step, len(self.residuals.rings))
        self.policy.record(Decision.REUSE, diff)
        return weights

    def forecast(self, streams: list[torch.Tensor], diff: float | None) -> list[torch.Tensor]:
        """Forecast the body's outputs from its inputs; of streams that it drops there is nothing to forecast."""
        out = self.residuals.forecast(self.policy.step, streams[: len(self.residuals.rings)])
        self.policy.record(Decision.REUSE, diff)
        return out

    def store(self, streams: list[torch.Tensor], outputs: list[torch.Tensor], diff: float | None) -> None:
        """Keep the residual of a computed step."""
        self.residuals.push(self.policy.step, streams, outputs)
        self.policy.record(Decision.COMPUTE, diff)

    def skip_storing(self, diff: float | None = None) -> None:
        """Take note of a computed step whose residual could not be stored."""
        self.policy.record(Decision.COMPUTE, diff, stored=False)


def _diff_of(other: SectionState, step: int) -> float | None:
    """The difference that another branch measured at this step, None where it measured none."""
    records = other.policy.records
    return records[-1].diff if records and records[-1].step == step else None


def _describe(specs: list[StreamSpec]) -> str:
    names = ("hidden_states", "encoder_hidden_states")
    return "; ".join(f"{name} {spec}" for name, spec in zip(names, specs, strict=False))
