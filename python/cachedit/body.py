"""DBCache's part of a forward: the sites that compute or reuse the blocks between head and tail as one body.

Sites of a section of N blocks, Fn = 2, Bn = 1, in a list of 6::

    block     0      1      2      3      4      5
    site      open   block  enter  skip   leave  block
              head          body ............... tail

``open`` notes the head's input, ``enter`` decides the step, ``skip`` passes its input on when the step is reused, and
``leave`` stores the body's residual (computed) or returns the forecast (reused). What a site does is looked up when it
is called, not when it is handed out, so a loop may collect the list beforehand, zip it or count it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn

from .blocks import EagerSite, Guard, Link, Section, called_again, current_run, onload_group
from .context import SectionState
from .metric import Measured
from .pattern import check_object, check_shapes
from .policy import Decision

__all__ = ["SectionRun"]


class SectionRun:
    """One section during one forward: what its sites share."""

    __slots__ = (
        "before",
        "bypassed",
        "decided",
        "diff",
        "guard",
        "head_encoder",
        "inputs",
        "keep",
        "object",
        "outputs",
        "reuse",
        "section",
        "state",
        "streams",
    )

    def __init__(self, section: Section, state: SectionState):
        self.section = section
        self.state = state
        self.before: torch.Tensor | None = None
        self.head_encoder: torch.Tensor | None = None
        self.object: Any = None  # what the head returned in the encoder's place, where that is no tensor
        self.streams: tuple[torch.Tensor, Any] | None = None  # what a skipped block hands on: the body's inputs
        self.inputs: list[torch.Tensor] = []  # the same, safe from being written to
        self.outputs: list[torch.Tensor] = []
        self.guard = Guard(section)
        self.keep = False
        self.decided = False
        self.reuse = False
        self.bypassed = False
        self.diff: float | None = None

    def open(self, hidden: torch.Tensor) -> None:
        """The first head block is about to run on ``hidden``."""
        if self.decided:
            raise called_again(self.section)
        self.before = self.guard(hidden)

    def enter(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """The body is about to run on these streams: decide."""
        streams = [hidden] if encoder is None else [hidden, encoder]
        if self.before is None:
            return  # the loop does not follow the list's order: leave the step alone
        if hidden.requires_grad or (encoder is not None and encoder.requires_grad):
            self.bypassed = True
            return
        self.streams = (hidden, self.object if encoder is None else encoder)
        self.decided = True
        self.reuse = self.decide(Measured(self.before, hidden, current_run().signal), streams)
        self.before = None  # nothing is held longer than it is needed: tensors are large
        if self.reuse:
            self.outputs = self.forecast(streams)
        else:
            self.inputs = [self.guard(tensor) for tensor in streams]
            self.keep = True

    # What of this touches the state; cuda_graphs.py has another way.

    def decide(self, seen: Measured, streams: list[torch.Tensor]) -> bool:
        """Whether the step is reused."""
        decision, self.diff = self.state.decide(seen, streams)
        return decision is Decision.REUSE

    def forecast(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """The body's outputs at a reused step."""
        return self.state.forecast(streams, self.diff)

    def store(self, outputs: list[torch.Tensor]) -> None:
        """Keep what the body added to its inputs."""
        self.state.store(self.inputs, outputs, self.diff)

    def leave(self, block: nn.Module, hidden: torch.Tensor, second: Any) -> None:
        """The body has returned these, its last block being ``block``: store its residual."""
        if not self.keep:
            return
        outputs = [hidden]
        if isinstance(second, torch.Tensor):
            outputs.append(second)
        else:
            check_object(block, second, self.object)
        self.inputs = self.inputs[: len(outputs)]  # the last block may drop the encoder's stream (SD3)
        check_shapes(block, self.inputs, outputs)
        if self.section.in_place is None:
            self.section.in_place = self.guard.compare()
        self.store(outputs)
        self.keep = False
        self.inputs, self.streams = [], None

    def finish(self) -> tuple[torch.Tensor, Any]:
        """Give out the forecast of a reused step."""
        outputs = self.outputs
        self.outputs, self.streams = [], None
        return outputs[0], outputs[1] if len(outputs) == 2 else self.object

    def close(self) -> None:
        """The forward has ended without an error: a step that was neither reused nor stored is still a step."""
        if self.keep or not self.decided:
            self.state.skip_storing(self.diff)

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
        """Hand out the sites of one list."""
        return chain.from_iterable(self._stretches(link, blocks))

    def _stretches(self, link: Link, blocks: list[nn.Module]) -> Iterator[Iterable[Any]]:
        """The sites of one list, a stretch at a time: each is made when the one before has run."""
        # First and last block of the body, numbered within this list; outside of it where they stand in another one.
        first, last, count = self.section.first - link.offset, self.section.last - link.offset, len(blocks)
        if first > last:  # empty body
            yield blocks
            return
        pattern = link.signature.pattern
        head: list[Any] = blocks[: max(first, 0)]
        if head and link.offset == 0:
            head[0] = _Open(head[0], self, link)
        if 0 < first <= count and not pattern.Return_H_Only:
            head[-1] = _HeadEnd(blocks[first - 1], self, link)
        yield head
        tail = blocks[max(last + 1, 0) :]
        if 0 <= first < count:
            yield (_Edge(blocks[first], self, link, True, first == last, tail),)
        inside = blocks[max(first + 1, 0) : max(last, 0)]
        if not self.decided:
            yield [_Body(block, self, link) for block in inside]
        elif self.reuse and self.streams is not None:
            yield map(_Skip, inside, repeat(pattern.pack(*self.streams)))
        else:
            yield inside  # the step is computed: the blocks themselves, nothing in between
        if first < last and 0 <= last < count:
            yield (_Edge(blocks[last], self, link, False, True, tail),)
        yield tail


class _Open(EagerSite):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.run.open(self.hidden(args, kwargs))
        return self.block(*args, **kwargs)


class _HeadEnd(EagerSite):
    """Last head block, where it returns two values: the second may be known from nowhere else."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.run.before is None:
            self.run.open(self.hidden(args, kwargs))
        output = self.block(*args, **kwargs)
        pattern = self.link.signature.pattern
        _, second = pattern.unpack(self.block, output)
        if not isinstance(second, torch.Tensor):
            self.run.object = second
        elif pattern.Forward_H_only:  # else the body is given it
            self.run.head_encoder = second
        return output


class _Body(EagerSite):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run.reuse and run.streams is not None:
            return self.link.signature.pattern.pack(*run.streams)
        return self.block(*args, **kwargs)


class _Skip:
    """A body block of a step that is known to be reused."""

    __slots__ = ("block", "passed_on")

    def __init__(self, block: nn.Module, passed_on: Any):
        self.block = block
        self.passed_on = passed_on

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.passed_on


class _Edge(EagerSite):
    """First and last block of the body (the same site where it has one block)."""

    __slots__ = ("enters", "leaves", "tail")

    def __init__(
        self, block: nn.Module, run: SectionRun, link: Link, enters: bool, leaves: bool, tail: list[nn.Module]
    ):
        super().__init__(block, run, link)
        self.enters = enters
        self.leaves = leaves
        self.tail = tail

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, pattern = self.run, self.link.signature.pattern
        if self.enters:
            encoder = None if pattern.Return_H_Only else self._encoder(args, kwargs)
            run.enter(self.hidden(args, kwargs), encoder)
        if run.reuse and run.streams is not None:
            if not self.leaves:
                return pattern.pack(*run.streams)
            if self.tail:
                onload_group(self.tail[0])
            return pattern.pack(*run.finish())
        output = self.block(*args, **kwargs)
        if self.leaves:
            run.leave(self.block, *pattern.unpack(self.block, output))
        return output

    def _encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        forward_h_only = self.link.signature.pattern.Forward_H_only
        given = self.run.head_encoder if forward_h_only else self.encoder(args, kwargs)
        return given if isinstance(given, torch.Tensor) else None
