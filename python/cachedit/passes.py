"""What is traced when a cached transformer is compiled: its own forward, once for each pass (``compiled.py``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .blocks import Link, Site, run_sections
from .policy import Decision
from .store import forecast_streams

if TYPE_CHECKING:
    from .controller import Controller
    from .request import Branch

__all__ = ["Forecast", "Passes", "Seen", "Streams", "run_pass"]

Streams = tuple[torch.Tensor, Any]  # hidden_states, and what is in the place of encoder_hidden_states


class Forecast(NamedTuple):
    """What a traced forecast reads."""

    rings: list[torch.Tensor]
    weights: list[torch.Tensor]
    """By slot, float32 on the rings' device: one tensor per stream, or one for all."""
    keeps_outputs: tuple[bool, bool]
    """As :class:`ResidualStore` has it."""
    scales: list[torch.Tensor] | None
    """Of rings in E4M3."""


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
        self.watched = self.outputs_are_kept = False  # as KeptOutputs has found
        self.told: set[str] = set()  # why forwards run eagerly

    def find(self, resumed: int | None, plan: tuple[Decision | None, ...]) -> FunctionType:
        """The function that traces one pass."""
        sections = self.controller.sections
        layout = tuple((section.first, section.last, section.total, section.in_place) for section in sections)
        functions = _functions.setdefault(self.controller.transformer, {})
        key = layout, resumed, plan
        if key not in functions:
            code = _trace.__code__.replace(co_name=f"cached_pass_{len(functions)}")
            functions[key] = FunctionType(code, _trace.__globals__)
        return functions[key]


# Per transformer, so that they outlive a cache that is enabled anew. Each function has its own code object, because
# dynamo counts and limits compilations by those.
_functions: WeakKeyDictionary[nn.Module, dict[Any, FunctionType]] = WeakKeyDictionary()


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
    with contextlib.suppress(_Stop):
        output = passes.original(*args, **kwargs)
    passes.run = None
    return Seen(run.stopped, run.before, run.streams, run.kept, run.finals, output)


def run_pass(
    passes: Passes,
    branch: Branch,
    resumed: int | None,
    plan: tuple[Decision | None, ...],
    given: dict[int, Streams],
    forecasts: dict[int, Forecast],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Seen:
    """The same, run instead of traced: how a step is cut for CUDA graphs."""
    run = _Run(passes, resumed, plan, given, forecasts)
    output = None
    with run_sections(passes.controller, [run] * len(plan), branch, args, kwargs), contextlib.suppress(_Stop):
        output = passes.original(*args, **kwargs)
    return Seen(run.stopped, run.before, run.streams, run.kept, run.finals, output)


class _Run:
    """What the block lists hand out in a pass, and what it leaves behind."""

    bypassed = False

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

    def close(self) -> None: ...  # what it leaves behind, its caller takes

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
        return iter([_Traced(block, self, link, number) for number, block in enumerate(blocks, link.offset)])

    def call(self, site: _Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for one block."""
        section, pattern = site.link.section, site.link.signature.pattern
        index, number = site.link.index, site.number
        if index in self.given and (index != self.resumed or number < section.first):  # an earlier pass was there
            return pattern.pack(*_copies(self.given[index]))
        if section.first <= number <= section.last:
            output = self._call_body(site, args, kwargs)
        else:
            if number == 0:
                hidden = site.hidden(args, kwargs)
                self.before = hidden.clone() if section.in_place else hidden
            output = site.block(*args, **kwargs)
            if number == section.first - 1 and not pattern.Return_H_Only:
                self.second = pattern.unpack(site.block, output)[1]
        if number == section.total - 1 and len(self.plan) > 1:
            self.finals[index] = _copies(pattern.unpack(site.block, output))
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
            streams = _copies(self.streams) if section.in_place else self.streams
            args, kwargs = site.link.signature.replace(args, kwargs, *streams)
        output = site.block(*args, **kwargs)
        if number == section.last:
            self.kept[index] = self.streams, _copies(pattern.unpack(site.block, output))
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


def _copies(streams: Streams) -> Streams:
    """Streams that nothing later in the forward can write to. Where nothing does, the compiler needs no copies."""
    hidden, second = streams
    return hidden.clone(), second.clone() if isinstance(second, torch.Tensor) else second


def _forecast(streams: Streams, forecast: Forecast) -> Streams:
    """The outputs of a reused body, as :meth:`ResidualStore.forecast` has them, with weights that are tensors."""
    hidden, second = streams
    inputs = [hidden, second][: len(forecast.rings)]  # of streams that the body drops there is nothing to forecast
    outputs = forecast_streams(inputs, forecast.rings, forecast.weights, forecast.keeps_outputs, forecast.scales)
    return outputs[0], outputs[1] if len(outputs) == 2 else None if isinstance(second, torch.Tensor) else second
