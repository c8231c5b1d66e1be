"""The one decision of a step: compute the body or reuse it. Plain Python; it sees numbers and returns a verdict."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple, Protocol

from .config import BasicCacheConfig, PolicyConfig

__all__ = ["Decision", "Policy", "StepPolicy", "StepRecord", "StepView", "UserPolicy"]


class Decision(Enum):
    """What to do with the body of a step. MEASURE: ask again, with the residual difference."""

    COMPUTE = "compute"
    REUSE = "reuse"
    MEASURE = "measure"


class StepRecord(NamedTuple):
    """What happened at one step: kept for statistics.

    ``pruned`` of the section's ``blocks`` were pruned; both are 0 where nothing is pruned block by block.
    """

    step: int
    reused: bool
    diff: float | None
    reason: str
    pruned: int = 0
    blocks: int = 0


class Policy:
    """Decides the steps of one branch of one request.

    A step is ``plan()``, then ``decide(diff)`` if the plan says MEASURE, then ``record()`` once it is carried out: an
    exception in between leaves the policy where it was.

    Args:
        config: Validated configuration.
        total_steps: Steps of the request, if known; resolves masks that are given by name.

    Raises:
        ValueError: If the configuration's mask does not have ``total_steps`` entries.
    """

    def __init__(self, config: BasicCacheConfig, total_steps: int | None = None):
        self.config = config
        self.threshold = config.residual_diff_threshold
        self.mask = config.resolve_mask(total_steps)
        self.static = self.mask is not None and config.steps_computation_policy == "static"
        warmup = config.max_warmup_steps
        if self.mask is not None:
            leading_ones = self.mask.index(0) if 0 in self.mask else len(self.mask)
            warmup = min(warmup, leading_ones)
        self.warmup = range(0, warmup, config.warmup_interval)
        self.records: list[StepRecord] = []
        self.nonfinite = 0
        self.step = 0  # of the request; statistics count in it
        self.restart()

    @property
    def measures(self) -> bool:
        """Whether any step may need the residual difference; if not, no anchor has to be stored."""
        return self.threshold > 0 and not self.static

    @property
    def never_reuses(self) -> bool:
        """Whether the configuration itself rules out every reuse."""
        config = self.config
        if self.mask is not None and (self.static or all(self.mask)):
            return all(self.mask)
        return self.threshold <= 0 or 0 in (config.max_cached_steps, config.max_continuous_cached_steps)

    def restart(self) -> None:
        """Forget everything stored, as at the start of a request; statistics carry on."""
        self.origin = self.step
        self.stored = False
        self.reused = 0
        self.run = 0
        self.accumulated = 0.0
        self.reason = ""

    def refresh_due(self) -> bool:
        """Whether ``force_refresh_step_hint`` asks for a fresh start at this step."""
        hint = self.config.force_refresh_step_hint
        if hint is None:
            return False
        # The step itself may have been skipped: a guidance branch need not run at each.
        if self.config.force_refresh_step_policy == "repeat":
            return self.step // hint > self.origin // hint
        return self.origin < hint <= self.step

    def plan(self) -> Decision:
        """Decide as far as the residual difference is not needed."""
        config = self.config
        step = self.step - self.origin
        if not self.stored:
            return self._compute("nothing stored")
        if step in self.warmup:
            return self._compute("warm-up")
        if self.mask is not None:
            within = step < len(self.mask)
            if (within and self.mask[step]) or (self.static and not within):
                return self._compute("mask")
            if self.static:
                self.reason = "mask"
                return Decision.REUSE
        if 0 <= config.max_cached_steps <= self.reused:
            return self._compute("max_cached_steps")
        if 0 <= config.max_continuous_cached_steps <= self.run:
            return self._compute("max_continuous_cached_steps")
        limit = config.max_accumulated_residual_diff_threshold
        if limit is not None and 0 < limit <= self.accumulated:
            return self._compute("accumulated diff")
        if self.threshold <= 0:
            return self._compute("threshold")
        return Decision.MEASURE

    def decide(self, diff: float | None) -> Decision:
        """Decide with the measured difference; NaN and infinity compute, and are counted.

        Args:
            diff: None where the branch whose difference serves here has measured none.
        """
        if diff is None:
            return self._compute("not measured")
        if not math.isfinite(diff):
            self.nonfinite += 1
            return self._compute("non-finite diff")
        self.reason = "diff"
        return Decision.REUSE if diff < self.threshold else Decision.COMPUTE

    def record(
        self, decision: Decision, diff: float | None, stored: bool = True, pruned: int = 0, blocks: int = 0
    ) -> None:
        """Take note that the step was carried out, and move to the next.

        Args:
            decision: COMPUTE or REUSE.
            diff: The measured difference, if it was measured.
            stored: Whether a computed step left its residual behind.
            pruned: Blocks that were pruned, where they decide one by one.
            blocks: Of so many.
        """
        reused = decision is Decision.REUSE
        self.records.append(StepRecord(self.step, reused, diff, self.reason, pruned, blocks))
        self.step += 1
        if reused:
            self.reused += 1
            self.run += 1
            self.accumulated += diff or 0.0
        else:
            self.run = 0
            self.accumulated = 0.0
            self.stored = stored

    def _compute(self, reason: str) -> Decision:
        self.reason = reason
        return Decision.COMPUTE


class StepView(NamedTuple):
    """What a :class:`StepPolicy` gets to see of a step."""

    step: int
    """Number of the step within the request, from 0."""
    total_steps: int | None
    """Steps of the request, if known."""
    diff: float | None
    """Relative L1 difference of the first blocks' residual to the last computed step; None until it is measured."""
    reused: int
    """Steps reused so far."""
    run: int
    """Steps reused in a row, up to the one before."""


class StepPolicy(Protocol):
    """A policy of one's own: ``PolicyConfig(policy=MyPolicy)``.

    One object is made per request, guidance branch and section. It is asked once something is stored; the first step
    is always computed.
    """

    def decide(self, step: StepView) -> Decision:
        """Return ``Decision.COMPUTE``, ``Decision.REUSE``, or ``Decision.MEASURE`` to be asked again with ``diff``.

        Measuring takes one operator call and waits for the device; a difference that is not finite computes.
        """
        ...


class UserPolicy(Policy):
    """Asks the user's policy in place of warm-up, mask and limits."""

    def __init__(self, config: PolicyConfig, total_steps: int | None = None):
        super().__init__(config, total_steps)
        self.total_steps = total_steps
        assert config.policy is not None
        self.user: StepPolicy = config.policy()
        if not callable(getattr(self.user, "decide", None)):
            raise TypeError(f"policy must make a StepPolicy, with a method decide, got {self.user!r}")

    @property
    def measures(self) -> bool:
        return True

    @property
    def never_reuses(self) -> bool:
        return False

    def plan(self) -> Decision:
        if not self.stored:
            return self._compute("nothing stored")
        return self._ask(None)

    def decide(self, diff: float | None) -> Decision:
        if diff is None or not math.isfinite(diff):
            return super().decide(diff)
        decision = self._ask(diff)
        if decision is Decision.MEASURE:
            raise TypeError(
                f"policy: {type(self.user).__name__}.decide asked to measure a step whose diff it was given ({diff})"
            )
        return decision

    def _ask(self, diff: float | None) -> Decision:
        self.reason = type(self.user).__name__
        decision = self.user.decide(StepView(self.step, self.total_steps, diff, self.reused, self.run))
        if not isinstance(decision, Decision):
            raise TypeError(f"policy: {self.reason}.decide must return a cachedit.Decision, got {decision!r}")
        return decision
