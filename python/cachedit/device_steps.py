"""A captured forward whose decisions fall on the device: one launch, no wait. Experimental: not yet run on a GPU.

It is cut where the passes of a compiled forward are (``passes.py``), and each pass is captured::

    head                          pre-ops, blocks 0 .. Fn-1, how far their residual moved
        decide                    on the device (csrc/policy.h), which chooses
    reused | computed             the forecast | blocks Fn .., store; tail, post-ops, or up to the next decision

What both alternatives leave to later pieces, and the output, lie in the same places. The ring's slot and the
forecast's weights are written on the device, too. The host learns what was decided when it asks: ``State.policy``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from cachedit_kernels.graphs import MAX_MASK, MAX_RECORDS, Control, Progress, Rules, StepGraph

from .captured import Backend, Captured, Forward
from .context import SectionState
from .forecast import Reuse, TaylorSeer
from .metric import HeadResidual, Measured
from .passes import Forecast, Passes, Seen, Streams, run_pass
from .policy import Decision

__all__ = ["DecidedForward", "DeviceSteps", "refuses"]


def refuses(state: SectionState, passes: Passes) -> str | None:
    """Why the steps of a section that can be captured are not decided on the device, or None."""
    if state.device is not None:
        return None
    forecaster, mask = state.residuals.forecaster, state.policy.mask
    if not isinstance(forecaster, (Reuse, TaylorSeer)):
        return f"{type(forecaster).__name__} weighs otherwise"
    if mask is not None and len(mask) > MAX_MASK:
        return f"the mask has {len(mask)} steps, beyond {MAX_MASK}"
    if not state.config.cfg_diff_compute_separate:
        return "branches share a difference (cfg_diff_compute_separate=False)"
    if not state.residuals.rings:
        return "nothing has been stored yet"
    if not passes.watched:
        return "its loop over the blocks was not seen to its end"
    if passes.outputs_are_kept:
        return "its loop keeps what single blocks return"
    return None


class DeviceSteps:
    """Steps of one section that a captured forward decides; on one state at a time."""

    def __init__(self, state: SectionState, device: torch.device):
        self.control = Control(_rules(state), device)
        self.steps = self.following = 0  # that were handed over, since it was begun; what the device counts next

    def take(self, state: SectionState) -> None:
        """Have the device decide the step to come; the state's policy follows when it is asked for."""
        if state.device is not self or self.steps == MAX_RECORDS:
            policy, residuals = state.policy, state.residuals
            counts = (policy.step, policy.origin, policy.reused, policy.run, policy.accumulated, policy.stored)
            at = Progress(*counts, residuals.next_slot, tuple(residuals.steps))
            self.control.begin(at, _rules(state))
            self.steps, self.following = 0, policy.step
            state.device = self
        if state.step != self.following:  # a guidance branch need not run at each
            self.control.set_step(state.step)
        state.step += 1
        self.steps, self.following = self.steps + 1, state.step


def _rules(state: SectionState) -> Rules:
    """The state's policy in numbers, as it stands at the request."""
    config, policy, forecaster = state.config, state.policy, state.residuals.forecaster
    return Rules(
        threshold=policy.threshold,
        accumulated_limit=config.max_accumulated_residual_diff_threshold or 0.0,
        max_cached_steps=config.max_cached_steps,
        max_continuous_cached_steps=config.max_continuous_cached_steps,
        warmup=config.max_warmup_steps,
        warmup_interval=config.warmup_interval,
        refresh_hint=config.force_refresh_step_hint or 0,
        refresh_repeats=config.force_refresh_step_policy == "repeat",
        mask=policy.mask or (),
        mask_is_static=policy.static,
        order=forecaster.order if isinstance(forecaster, TaylorSeer) else 0,
    )


class DecidedForward(Captured):
    """A captured forward that decides each section as it gets there.

    Args:
        forward: What to capture.
        backend: Captures its pieces.

    Raises:
        Exception: Whatever keeps it from being captured.
    """

    def __init__(self, forward: Forward, backend: Backend):
        super().__init__(forward.tensors)
        with torch.inference_mode(False), torch.no_grad():
            self.sections = [DeviceSteps(state, forward.device) for state in forward.states]
        cut = _Cut(forward, [section.control for section in self.sections])
        with _kept_as_they_are(forward.states), StepGraph(forward.device) as step:
            cut.walk(lambda run: (run(), None))  # whatever is compiled or chosen at a first run
            head, decisions, self.output = cut.walk(lambda run: backend.piece(run, forward.pool))
            step.add(head)
            for each in decisions:
                step.branch(cut.controls[each.section], each.sums, each.reused, each.computed)
            self.launch = step.instantiate()

    def run(self, states: list[SectionState]) -> None:
        for section, state in zip(self.sections, states, strict=True):
            section.take(state)
        self.launch()


class _Shown(NamedTuple):
    """What a piece leaves to those after it; fields as in :class:`Seen`."""

    section: int | None
    before: torch.Tensor | None
    streams: Streams | None
    finals: dict[int, Streams]
    sums: torch.Tensor | None
    """float32 ``[1, 2]`` that the section is decided by."""
    output: Any


class _Decision(NamedTuple):
    """Where a section is decided, and the graphs of what follows."""

    section: int
    sums: torch.Tensor
    reused: Any
    computed: Any


Piece = Callable[[Callable[[], _Shown]], tuple[_Shown, Any]]  # runs a piece; returns what it shows, and its graph


class _Cut:
    """A forward in pieces."""

    def __init__(self, forward: Forward, controls: list[Control]):
        self.forward, self.controls = forward, controls
        self.sections = forward.controller.sections
        self.measures = [state.policy.measures for state in forward.states]

    def walk(self, piece: Piece) -> tuple[Any, list[_Decision], Any]:
        """Run all pieces, both alternatives of each decision; return the head's graph, the decisions, the output."""
        shown, head = piece(self._head)
        decisions: list[_Decision] = []
        finals: dict[int, Streams] = {}
        while shown.section is not None:
            assert shown.sums is not None and shown.streams is not None
            finals = finals | shown.finals
            given = {**finals, shown.section: shown.streams}
            after, reused = piece(partial(self._reused, shown.section, given))
            _, computed = piece(partial(self._computed, shown.section, given, shown.before, after))
            decisions.append(_Decision(shown.section, shown.sums, reused, computed))
            shown = after
        if missed := set(range(len(self.sections))) - {each.section for each in decisions}:
            name = self.sections[min(missed)].name
            raise RuntimeError(f"the forward did not run through {name} as a cached one does")
        return head, decisions, shown.output

    def _head(self) -> _Shown:
        return self._show(self._run(None, None, {}, {}))

    def _reused(self, index: int, given: dict[int, Streams]) -> _Shown:
        residuals, weights = self.forward.states[index].residuals, self.controls[index].weights
        rows = residuals.rows(weights, len(residuals.rings))
        forecast = Forecast(residuals.rings, rows, residuals.keeps_outputs, residuals.scales)
        seen = self._run(index, Decision.REUSE, given, {index: forecast})
        # Copies: the other alternative writes to these places, which must not be those of something else as well.
        shown: _Shown = pytree.tree_map(_clone, self._show(seen))
        return shown

    def _computed(self, index: int, given: dict[int, Streams], before: Any, places: _Shown) -> _Shown:
        seen = self._run(index, Decision.COMPUTE, given, {})
        assert before is not None
        state = self.forward.states[index]
        streams, outputs = ([s for s in kept if isinstance(s, torch.Tensor)] for kept in seen.kept[index])
        if self.measures[index]:
            _metric(state).write(Measured(before, streams[0]))
        state.residuals.write(self.controls[index].slot, streams[: len(outputs)], outputs)
        _copy(self._show(seen), places)
        return places

    def _run(
        self, resumed: int | None, decision: Decision | None, given: dict[int, Streams], forecasts: dict[int, Forecast]
    ) -> Seen:
        forward = self.forward
        plan = tuple(decision if index == resumed else None for index in range(len(self.sections)))
        passes = forward.controller.passes
        return run_pass(passes, forward.branch, resumed, plan, given, forecasts, forward.args, forward.kwargs)

    def _show(self, seen: Seen) -> _Shown:
        sums = None
        if seen.section is not None:
            assert seen.before is not None and seen.streams is not None
            state = self.forward.states[seen.section]
            if self.measures[seen.section]:
                sums = _metric(state).sums(Measured(seen.before, seen.streams[0]))
            else:
                sums = torch.zeros((1, 2), device=seen.before.device)
        return _Shown(seen.section, seen.before, seen.streams, seen.finals, sums, seen.output)


def _metric(state: SectionState) -> HeadResidual:
    assert isinstance(state.metric, HeadResidual)
    return state.metric


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _copy(tree: Any, places: Any) -> None:
    """Have the computed alternative leave what it does where the reused one does."""
    leaves, structure = pytree.tree_flatten(tree)
    others, expected = pytree.tree_flatten(places)
    if structure != expected or list(map(_kind, leaves)) != list(map(_kind, others)):
        raise RuntimeError("a reused step leaves other tensors than a computed one")
    for leaf, place in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            place.copy_(leaf)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else type(leaf)


@contextmanager
def _kept_as_they_are(states: list[SectionState]) -> Iterator[None]:
    """What pieces run for the first time do to the buffers is undone: the step is still to come."""
    buffers = [buffer for state in states for buffer in state.buffers]
    copies = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
