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

This module imports dynamo. Functions that :func:`run_in_passes` calls are frames of their own to it: those not to be traced
are disabled whole.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

import cachedit_kernels as kernels

from .blocks import Link, Site
from .config import DBPruneConfig
from .context import StreamSpec
from .metric import Measured
from .policy import Decision
from .request import Branch

if TYPE_CHECKING:
    from .controller import CachedForward, Controller, Step

__all__ = ["Passes", "is_compiling", "run_in_passes"]

logger = logging.getLogger(__name__)

Streams = tuple[torch.Tensor, Any]  # hidden_states, and what is in the place of encoder_hidden_states


class Forecast(NamedTuple):
    """What a traced forecast reads."""

    rings: list[torch.Tensor]
    weights: list[torch.Tensor]
    """By slot, float32 on the rings' device: one tensor per stream, or one for all."""
    keeps_outputs: tuple[bool, bool]
    """As :class:`ResidualStore` has it."""

    def base(self, stream: int) -> float:
        return 0.0 if self.keeps_outputs[stream] else 1.0


class Seen(NamedTuple):
    """What a pass returns."""

    section: int | None
    """Which section is to be decided now; None if the forward is done."""
    before: torch.Tensor | None
    """hidden_states as that section's first block got it."""
    streams: Streams | None
    """That section's streams after its head."""
    kept: dict[int, tuple[Streams, Streams]]
    """By section that was computed: streams before and after its body."""
    finals: dict[int, Streams]
    """By section that is through: streams after its last block."""
    output: Any
    """The transformer's."""


class _Stop(Exception):
    """Ends the trace of a pass where the next decision falls."""


class Passes:
    """The passes of one transformer.

    Args:
        controller: Its controller.
        original: Its own forward.
    """

    def __init__(self, controller: Controller, original: Any):
        self.controller = controller
        self.original = original
        self.run: _Run | None = None  # while a pass is traced
        self.traced: dict[Any, FunctionType] = {}
        self.told: set[str] = set()

    def find(self, resumed: int | None, plan: tuple[Decision | None, ...]) -> FunctionType:
        """The function that traces one pass.

        Each has its own code object, because dynamo counts and limits compilations by those.
        """
        key = resumed, plan
        if key not in self.traced:
            code = _trace.__code__.replace(co_name=f"cached_pass_{len(self.traced)}")
            self.traced[key] = FunctionType(code, _trace.__globals__)
        return self.traced[key]


def _trace(
    passes: Passes,
    resumed: int | None,
    plan: tuple[Decision | None, ...],
    given: dict[int, Streams],
    forecasts: dict[int, Forecast],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Seen:
    """One pass.

    Args:
        passes: The transformer's.
        resumed: Section whose head has run in the pass before.
        plan: What to do with the body of each section; None: stop there.
        given: Streams at which the resumed section goes on, and at which sections before it have ended.
        forecasts: By section that is reused.
        args, kwargs: The transformer's.
    """
    run = _Run(passes, resumed, plan, given, forecasts)
    passes.run = run
    output = None
    try:
        output = passes.original(*args, **kwargs)
    except _Stop:
        pass
    passes.run = None
    return Seen(run.stopped, run.before, run.streams, run.kept, run.finals, output)


class _Run:
    """What the block lists hand out while a pass is traced, and what it leaves behind."""

    def __init__(
        self,
        passes: Passes,
        resumed: int | None,
        plan: tuple[Decision | None, ...],
        given: dict[int, Streams],
        forecasts: dict[int, Forecast],
    ):
        self.passes, self.resumed, self.plan, self.given, self.forecasts = passes, resumed, plan, given, forecasts
        self.stopped: int | None = None
        self.before: torch.Tensor | None = None
        self.second: Any = None  # what the head returned in the encoder's place
        self.streams: Streams | None = None  # at which the body of the section in work began
        self.outputs: Streams | None = None  # that are forecast for it
        self.kept: dict[int, tuple[Streams, Streams]] = {}
        self.finals: dict[int, Streams] = {}

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
        return iter([_Traced(block, self, link, number) for number, block in enumerate(blocks, link.offset)])

    def call(self, site: _Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for one block."""
        section, pattern = site.link.section, site.link.signature.pattern
        index, number = site.link.index, site.number
        if index in self.given and (index != self.resumed or number < section.first):
            return pattern.pack(*self.given[index])  # an earlier pass was there
        if section.first <= number <= section.last:
            output = self._call_body(site, args, kwargs)
        else:
            if number == 0:
                self.before = _safe(section.in_place, site.hidden(args, kwargs))
            output = site.block(*args, **kwargs)
            if number == section.first - 1 and not pattern.Return_H_Only:
                self.second = pattern.unpack(site.block, output)[1]
        if number == section.total - 1:
            self.finals[index] = pattern.unpack(site.block, output)
        return output

    def _call_body(self, site: _Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        section, pattern = site.link.section, site.link.signature.pattern
        index, number = site.link.index, site.number
        if number == section.first:
            self._enter(site, args, kwargs)
        assert self.streams is not None
        if self.plan[index] is Decision.REUSE:
            assert self.outputs is not None
            return pattern.pack(*(self.outputs if number == section.last else self.streams))
        if number == section.first:
            hidden, second = self.streams
            args, kwargs = site.link.signature.replace(
                args, kwargs, _safe(section.in_place, hidden), _safe(section.in_place, second)
            )
        output = site.block(*args, **kwargs)
        if number == section.last:
            self.kept[index] = self.streams, pattern.unpack(site.block, output)
        return output

    def _enter(self, site: _Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The body of a section begins: find its streams, stop if it is not decided, forecast if it is reused."""
        index, pattern = site.link.index, site.link.signature.pattern
        if index == self.resumed:
            self.streams = self.given[index]
        else:
            encoder = self.second if pattern.Forward_H_only else site.encoder(args, kwargs)
            self.streams = site.hidden(args, kwargs), None if pattern.Return_H_Only else encoder
        if self.plan[index] is None:
            self.stopped = index
            raise _Stop
        if self.plan[index] is Decision.REUSE:
            self.outputs = _forecast(self.streams, self.forecasts[index])


class _Traced(Site):
    __slots__ = ("number",)

    def __init__(self, block: nn.Module, run: _Run, link: Link, number: int):
        super().__init__(block, run, link)
        self.number = number

    def __getattr__(self, name: str) -> Any:
        if name == "block":  # dynamo looks at objects that it has not initialised
            raise AttributeError(name)
        return getattr(self.block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run.call(self, args, kwargs)

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.link.signature.hidden(args, kwargs)

    def encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.link.signature.encoder(args, kwargs)


def _safe(in_place: bool | None, stream: Any) -> Any:
    """A stream that blocks which write to their inputs cannot spoil."""
    return stream.clone() if in_place and isinstance(stream, torch.Tensor) else stream


def _forecast(streams: Streams, forecast: Forecast) -> Streams:
    """The outputs of a reused body, as :meth:`ResidualStore.forecast` has them, with weights that are tensors."""
    hidden, second = streams
    inputs = [hidden, second][: len(forecast.rings)]  # of streams that the body drops there is nothing to forecast
    if len(forecast.weights) == 1:
        outputs = kernels.residual_forecast(inputs, forecast.rings, forecast.weights[0], forecast.base(0))
    else:
        outputs = [
            kernels.residual_forecast([stream], [ring], forecast.weights[i], forecast.base(i))[0]
            for i, (stream, ring) in enumerate(zip(inputs, forecast.rings, strict=True))
        ]
    return outputs[0], outputs[1] if len(outputs) == 2 else None if isinstance(second, torch.Tensor) else second


# What follows runs between passes, on the host, and is not traced.


def is_compiling() -> bool:
    """Whether the caller, itself never traced, was called under ``torch.compile``: this frame is traced then."""
    return torch.compiler.is_compiling()


class _Progress:
    """One forward on its way through its passes: ``traced(*arguments)`` is the next one, None when it is done."""

    traced: FunctionType | None = None
    output: Any = None

    def __init__(self, passes: Passes, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.passes, self.step, self.args, self.kwargs = passes, step, args, kwargs
        self.states: list[Any] = step.branch.states
        self.recorded: set[int] = set()  # sections whose step is decided and taken note of
        self.diffs: dict[int, float | None] = {}
        self.finals: dict[int, Streams] = {}
        plan: list[Decision | None] = [None] * len(self.states)
        forecasts = {}
        if all(state.policy.static for state in self.states):
            _start_afresh_on_new_inputs(step.branch, args, kwargs)
            for index, state in enumerate(self.states):
                plan[index] = state.decide_unseen()
                if plan[index] is Decision.REUSE:
                    forecasts[index] = self._forecast(index)
        self._go_on(None, plan, {}, forecasts)

    def advance(self, seen: Seen) -> None:
        """A pass has ended: store what it has computed, and decide what it has shown."""
        for index, (inputs, outputs) in seen.kept.items():
            state = self.states[index]
            state.check_streams(_tensors(inputs))
            state.store(_tensors(inputs)[: len(_tensors(outputs))], _tensors(outputs), self.diffs.get(index))
            self.recorded.add(index)
        self.finals |= seen.finals
        index = seen.section
        if index is None:
            self.traced, self.output = None, seen.output
            for other in set(range(len(self.states))) - self.recorded:
                self.states[other].skip_storing(self.diffs.get(other))
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
        return Forecast(residuals.rings, weights, residuals.keeps_outputs)


class _Done(_Progress):
    """A forward that needed no passes."""

    def __init__(self, output: Any):
        self.output = output


@torch.compiler.disable
def _begin(forward: CachedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Progress | None:
    """Begin a forward; run it to its end where it has to run eagerly. None: the cache is bypassed."""
    controller = forward.controller
    if controller.is_bypassed():
        return None
    if _runs_eagerly(forward.passes, args, kwargs):
        return _Done(controller.forward(forward.original, args, kwargs))
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


def _run_in_passes(forward: CachedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


run_in_passes = torch.compiler.disable(_run_in_passes, recursive=False)
"""Run a cached forward that was called under ``torch.compile``: ``run_in_passes(forward, args, kwargs)``."""


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
    elif any("_diffusers_hook" in vars(block) for blocks, _ in controller.lists for block in blocks):
        reason = "its blocks have hooks"
    if reason is not None and reason not in passes.told:
        passes.told.add(reason)
        logger.info(
            "the cached forward of %s is not compiled as a whole: %s; compile_repeated_blocks() serves it",
            type(controller.transformer).__name__,
            reason,
        )
    # The first forward shows whether blocks write to their inputs, and that the loop follows the list's order.
    unknown = not sections or any(section.in_place is None and section.body > 0 for section in sections)
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _leaves((args, kwargs)))
    return reason is not None or unknown or trained


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
    if branch.inputs != inputs:
        branch.inputs = inputs
        for state in branch.states:
            state.release()


@functools.lru_cache(maxsize=1024)
def _on_device(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Weights as a tensor. Schedules repeat themselves, so that from the second request on nothing is copied."""
    with torch.inference_mode(False):
        host = torch.tensor(weights, dtype=torch.float32, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)  # does not wait for the device
