"""A cached forward under ``torch.compile``: traced in passes, with the decision between them.

What a step does depends on numbers that only the running step has, and a branch on them inside of the loop over the
blocks would break the graph there. So the transformer's own forward is traced several times, each pass a graph without
a break, and the block list hands out something else in each::

    head pass                    pre-ops, blocks 0 .. Fn-1; stops there
        decide                   on the host, not traced: eager's own code
    compute pass | reuse pass    blocks Fn .. | the forecast in their place; tail, post-ops

Where a pass takes up the streams that the one before has left, what led to them in its own trace is dead, and the
compiler drops it. Lists that decide separately are one more pass each. Where static masks decide, nothing has to be
seen of a step, and each pass is a whole forward.

What changes from step to step reaches a pass as tensors (streams, rings, weights), so nothing is compiled anew; the
residual is stored between passes by eager's own operator call.

This module imports dynamo, to which functions that :func:`run_in_passes` calls are frames of their own: those that are
not to be traced are disabled whole.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._dynamo.decorators import skip

from .config import DBPruneConfig
from .context import SectionState, StreamSpec
from .kept import KeptOutputs
from .metric import Measured
from .passes import Forecast, Passes, Seen, Streams
from .policy import Decision
from .request import Branch

if TYPE_CHECKING:
    from .controller import Step
    from .forward import CachedForward

__all__ = ["is_compiling", "run_in_passes"]

logger = logging.getLogger(__name__)


def is_compiling() -> bool:
    """Whether the caller, itself never traced, was called under ``torch.compile``: this frame is traced then."""
    return torch.compiler.is_compiling()


class _Progress:
    """One forward on its way through its passes: ``traced(*arguments)`` is the next one, None when it is done."""

    traced: Callable[..., Seen] | None = None
    output: Any = None

    def __init__(self, passes: Passes, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.passes, self.step, self.args, self.kwargs = passes, step, args, kwargs
        self.states = cast("list[SectionState]", step.branch.states)
        self.recorded: set[int] = set()  # sections whose step is decided and taken note of
        self.diffs: dict[int, float | None] = {}
        self.finals: dict[int, Streams] = {}
        plan: list[Decision | None] = [None] * len(self.states)
        forecasts = {}
        if all(state.policy.static for state in self.states):
            _start_afresh_on_new_inputs(step.branch, args, kwargs)
            for i, state in enumerate(self.states):
                plan[i] = state.decide_unseen()
                if plan[i] is Decision.REUSE:
                    forecasts[i] = self._forecast(i)
        self._go_on(None, plan, {}, forecasts)

    def advance(self, seen: Seen) -> None:
        """A pass has ended: store what it has computed, and decide what it has shown."""
        for i, (inputs, outputs) in seen.kept.items():
            before, after = _tensors(inputs), _tensors(outputs)
            self.states[i].check_streams(before)
            self.states[i].store(before[: len(after)], after, self.diffs.get(i))
            self.recorded.add(i)
        self.finals |= seen.finals
        index = seen.section
        if index is None:
            self.traced, self.output = None, seen.output
            for i in set(range(len(self.states))) - self.recorded:
                self.states[i].skip_storing(self.diffs.get(i))
            self.passes.controller.end_step(self.step)
            return
        assert seen.before is not None and seen.streams is not None
        measured = Measured(seen.before, seen.streams[0])
        plan: list[Decision | None] = [None] * len(self.states)
        plan[index], self.diffs[index] = self.states[index].decide(measured, _tensors(seen.streams))
        forecasts = {index: self._forecast(index)} if plan[index] is Decision.REUSE else {}
        self._go_on(index, plan, {**self.finals, index: seen.streams}, forecasts)

    def _go_on(self, resumed: int | None, plan: list[Decision | None], given: Any, forecasts: Any) -> None:
        self.traced = self.passes.find(resumed, tuple(plan))
        self.arguments = (self.passes, resumed, tuple(plan), given, forecasts, self.args, self.kwargs)

    def _forecast(self, index: int) -> Forecast:
        residuals = self.states[index].residuals
        device = residuals.rings[0].device
        weights = [_on_device(tuple(row), device) for row in self.states[index].weigh(self.diffs.get(index))]
        self.recorded.add(index)
        return Forecast(residuals.rings, weights, residuals.keeps_outputs, residuals.scales)


class _Done(_Progress):
    """A forward that needed no passes."""

    def __init__(self, output: Any):
        self.output = output


@torch.compiler.disable
def _begin(forward: CachedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Progress | None:
    """Begin a forward; run it to its end where it has to run eagerly. None: the cache is bypassed."""
    controller = forward.controller
    if controller.is_bypassed(args, kwargs):
        return None
    if _runs_eagerly(forward.passes, args, kwargs):
        return _Done(_run_eagerly(forward, args, kwargs))
    step = controller.begin_step()
    try:
        return _Progress(forward.passes, step, args, kwargs)
    except BaseException:
        controller.abandon_step(step)
        raise


@torch.compiler.disable
def _advance(progress: _Progress, seen: Seen) -> None:
    progress.advance(seen)


@torch.compiler.disable
def _abandon(progress: _Progress) -> None:
    progress.passes.controller.abandon_step(progress.step)


# torch.compiler.disable(recursive=False) says the same, but dynamo then asks again at each call, for 0.15 ms.
@skip
def run_in_passes(forward: CachedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a cached forward that was called under ``torch.compile``."""
    progress = _begin(forward, args, kwargs)
    if progress is None:
        return forward.original(*args, **kwargs)
    while progress.traced is not None:
        try:
            _advance(progress, progress.traced(*progress.arguments))
        except BaseException:
            _abandon(progress)
            raise
    return progress.output


def _runs_eagerly(passes: Passes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward has to run eagerly; says why, where it always will."""
    controller = passes.controller
    sections = controller.sections
    reason = None
    if any(isinstance(section.config, DBPruneConfig) for section in sections):
        reason = "DBPrune decides block by block"
    elif controller.tap is not None:
        reason = "TeaCache listens to a module within it"
    elif any(section.group is not None for section in sections):
        reason = "its sequence is split among ranks"
    elif passes.outputs_are_kept:
        reason = "its loop keeps what single blocks return"
    elif any("_diffusers_hook" in vars(block) for blocks, _ in controller.lists for block in blocks):
        reason = "its blocks have hooks"
    if reason is not None and reason not in passes.told:
        passes.told.add(reason)
        logger.info(
            "the cached forward of %s is not compiled as a whole: %s; compile_repeated_blocks() serves it",
            type(controller.transformer).__name__,
            reason,
        )
    # A computed step shows whether blocks write to their inputs, and whether the loop is one that can be cut.
    unknown = not passes.watched or any(section.in_place is None and section.body > 0 for section in sections)
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _leaves((args, kwargs)))
    return reason is not None or unknown or trained


def _run_eagerly(forward: CachedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    controller, passes = forward.controller, forward.passes
    if passes.watched:
        return controller.forward(forward.original, args, kwargs)
    with KeptOutputs(controller) as watched:
        output = controller.forward(forward.original, args, kwargs)
    passes.watched, passes.outputs_are_kept = watched.complete, watched.found
    return output


def _tensors(streams: Streams) -> list[torch.Tensor]:
    return [stream for stream in streams if isinstance(stream, torch.Tensor)]


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(tuple(value.values()))


def _start_afresh_on_new_inputs(branch: Branch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where the streams are not seen before the step is decided, the transformer's inputs tell whether they changed."""
    inputs = [StreamSpec.of(tensor) for tensor in _leaves((args, kwargs))]
    if branch.inputs not in (None, inputs):
        for state in branch.states:
            state.release()
    branch.inputs = inputs


@functools.lru_cache(maxsize=1024)
def _on_device(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Weights as a tensor. Schedules repeat themselves, so that from the second request on nothing is copied."""
    with torch.inference_mode(False):
        host = torch.tensor(weights, dtype=torch.float32, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)  # does not wait for the device
