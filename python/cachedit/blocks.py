"""Interception of block lists: what a transformer's loop over its blocks gets handed while a step is cached.

A ``ModuleList`` object is given a subclass as its class (:func:`intercept`), whose iteration hands out *sites* in place
of blocks, but only inside a forward of a transformer that the cache is enabled on. Everything else - indexing,
slicing, ``len``, child names, iteration outside of a forward - is the plain list.

Sites of a section of N blocks, Fn = 2, Bn = 1, in a list of 6::

    block     0      1      2      3      4      5
    site      open   block  enter  skip   leave  block
              head          body ............... tail

``open`` notes the head's input, ``enter`` decides the step, ``skip`` passes its input on when the step is reused, and
``leave`` stores the body's residual (computed) or returns the forecast (reused). What a site does is looked up when it
is called, not when it is handed out, so a loop may collect the list beforehand, zip it or count it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import nn

from .context import SectionState
from .pattern import BlockSignature, describe_block
from .policy import Decision

__all__ = ["Link", "Section", "SectionRun", "current_run", "intercept", "release", "run_sections"]

_thread = threading.local()  # .run: the innermost cached forward of this thread


class Section:
    """Block lists of one transformer that share one decision; blocks are numbered through all of them.

    Args:
        name: Shown in statistics.
        total: Number of blocks.
        Fn: Blocks at the start that are always computed.
        Bn: Blocks at the end that are always computed.
    """

    def __init__(self, name: str, total: int, Fn: int, Bn: int):
        self.name = name
        self.total = total
        self.configure(Fn, Bn)
        # Whether blocks write into their inputs; None until the first computed step has shown it.
        self.in_place: bool | None = None

    def configure(self, Fn: int, Bn: int) -> None:
        """Set how many blocks at the start and at the end are always computed."""
        self.first = Fn  # block of the body
        self.last = self.total - Bn - 1

    @property
    def body(self) -> int:
        """Number of blocks that a reused step skips."""
        return max(self.last - self.first + 1, 0)


class Link:
    """Where one block list stands in a section.

    Args:
        index: Position of the section among the transformer's sections.
        section: The section.
        offset: Number of the list's first block within the section.
        signature: Finds the streams among a block's arguments.
    """

    def __init__(self, index: int, section: Section, offset: int, signature: BlockSignature):
        self.index = index
        self.section = section
        self.offset = offset
        self.signature = signature


class SectionRun:
    """One section during one forward: what its sites share."""

    __slots__ = (
        "before",
        "bypassed",
        "decided",
        "diff",
        "head_encoder",
        "inputs",
        "keep",
        "originals",
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
        self.streams: tuple[torch.Tensor, torch.Tensor | None] | None = None  # the body's inputs, as they came
        self.inputs: list[torch.Tensor] = []  # the same, safe from being written to
        self.outputs: list[torch.Tensor] = []
        self.originals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.keep = False
        self.decided = False
        self.reuse = False
        self.bypassed = False
        self.diff: float | None = None

    def open(self, hidden: torch.Tensor) -> None:
        """The first head block is about to run on ``hidden``."""
        self.before = self._guard(hidden)

    def enter(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """The body is about to run on these streams: decide."""
        streams = [hidden] if encoder is None else [hidden, encoder]
        if self.before is None:
            return  # the loop does not follow the list's order: leave the step alone
        if hidden.requires_grad or (encoder is not None and encoder.requires_grad):
            self.bypassed = True
            return
        self.streams = (hidden, encoder)
        self.decided = True
        decision, self.diff = self.state.decide(self.before, streams)
        self.before = None  # nothing is held longer than it is needed: tensors are large
        if decision is Decision.REUSE:
            self.outputs = self.state.forecast(streams, self.diff)
            self.reuse = True
        else:
            self.inputs = [self._guard(tensor) for tensor in streams]
            self.keep = True

    def leave(self, block: nn.Module, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """The body has returned these streams, its last block being ``block``: store its residual."""
        if not self.keep:
            return
        outputs = [hidden] if encoder is None else [hidden, encoder]
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in self.inputs]:
            raise TypeError(
                f"forward_pattern: the body's streams (hidden_states, encoder_hidden_states) have shapes "
                f"{_shapes(self.inputs)}, but {describe_block(block)} returned {_shapes(outputs)}; "
                "is the order of its outputs another (Pattern_0 or Pattern_1, Pattern_4 or Pattern_5)?"
            )
        self._learn_in_place()
        self.state.store(self.inputs, outputs, self.diff)
        self.keep = False
        self.inputs, self.streams = [], None

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give out the forecast of a reused step."""
        outputs = self.outputs
        self.outputs, self.streams = [], None
        return outputs[0], outputs[1] if len(outputs) == 2 else None

    def close(self) -> None:
        """The forward has ended without an error: a step that was neither reused nor stored is still a step."""
        if self.keep or not self.decided:
            self.state.skip_storing(self.diff)

    def _guard(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that still holds these values when the blocks have run."""
        if self.section.in_place is False:
            return tensor
        copy = tensor.clone()
        if self.section.in_place is None:
            self.originals.append((tensor, copy))
        return copy

    def _learn_in_place(self) -> None:
        if self.section.in_place is None:
            self.section.in_place = not all(torch.equal(tensor, copy) for tensor, copy in self.originals)
            self.originals = []


class _Site:
    """Stands in for a block while it is called in a loop; attributes are the block's."""

    __slots__ = ("block", "link", "run")

    def __init__(self, block: nn.Module, run: SectionRun, link: Link):
        self.block = block
        self.run = run
        self.link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class _Open(_Site):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.run.open(self.link.signature.hidden(args, kwargs))
        return self.block(*args, **kwargs)


class _HeadEnd(_Site):
    """Last head block where the encoder stream is only returned, never taken (patterns 4 and 5)."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.run.before is None:
            self.run.open(self.link.signature.hidden(args, kwargs))
        output = self.block(*args, **kwargs)
        _, self.run.head_encoder = self.link.signature.pattern.unpack(self.block, output)
        return output


class _Body(_Site):
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.passed_on


class _Edge(_Site):
    """First and last block of the body (the same site where it has one block)."""

    __slots__ = ("enters", "leaves")

    def __init__(self, block: nn.Module, run: SectionRun, link: Link, enters: bool, leaves: bool):
        super().__init__(block, run, link)
        self.enters = enters
        self.leaves = leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, signature = self.run, self.link.signature
        pattern = signature.pattern
        if self.enters:
            encoder = None if pattern.Return_H_Only else _encoder(signature, run, args, kwargs)
            run.enter(signature.hidden(args, kwargs), encoder)
        if run.reuse and run.streams is not None:
            return pattern.pack(*(run.finish() if self.leaves else run.streams))
        output = self.block(*args, **kwargs)
        if self.leaves:
            run.leave(self.block, *pattern.unpack(self.block, output))
        return output


def _encoder(
    signature: BlockSignature, run: SectionRun, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    return run.head_encoder if signature.pattern.Forward_H_only else signature.encoder(args, kwargs)


class _InterceptedList(nn.ModuleList):
    """Mixed into the class of one list object; ``_cachedit_links`` maps the controllers to the list's place."""

    def __iter__(self) -> Iterator[Any]:
        forward = current_run()
        link = None if forward is None else vars(self)["_cachedit_links"].get(forward.controller)
        if forward is None or link is None:
            return super().__iter__()
        return _sites(forward.sections[link.index], link, list(self._modules.values()))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # a slice is a plain list of the same blocks
            return vars(type(self))["_cachedit_class"](list(self._modules.values())[index])
        return super().__getitem__(index)


def _sites(run: SectionRun, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
    # First and last block of the body, numbered within this list; outside of it where they stand in another one.
    first, last, count = run.section.first - link.offset, run.section.last - link.offset, len(blocks)
    if first > last:  # empty body
        yield from blocks
        return
    pattern = link.signature.pattern
    for i in range(min(first, count)):
        if i == first - 1 and pattern.Forward_H_only and not pattern.Return_H_Only:
            yield _HeadEnd(blocks[i], run, link)
        elif i + link.offset == 0:
            yield _Open(blocks[i], run, link)
        else:
            yield blocks[i]
    if 0 <= first < count:
        yield _Edge(blocks[first], run, link, True, first == last)
    inside = blocks[max(first + 1, 0) : max(last, 0)]
    if not run.decided:
        for block in inside:
            yield _Body(block, run, link)
    elif run.reuse and run.streams is not None:
        yield from map(_Skip, inside, repeat(pattern.pack(*run.streams)))
    else:
        yield from inside  # the step is computed: the blocks themselves, nothing in between
    if first < last and 0 <= last < count:
        yield _Edge(blocks[last], run, link, False, True)
    yield from blocks[max(last + 1, 0) :]


def _shapes(tensors: list[torch.Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def intercept(blocks: nn.ModuleList, controller: Any, link: Link) -> None:
    """Hand out sites from this list object during forwards of ``controller``; other lists of its class stay as are."""
    if not isinstance(blocks, _InterceptedList):
        original = type(blocks)
        blocks.__class__ = type(original.__name__, (_InterceptedList, original), {"_cachedit_class": original})
        vars(blocks)["_cachedit_links"] = {}
    vars(blocks)["_cachedit_links"][controller] = link


def release(blocks: nn.ModuleList, controller: Any) -> None:
    """Undo :func:`intercept` for ``controller``; with the last one the list gets its own class back."""
    if isinstance(blocks, _InterceptedList):
        links = vars(blocks)["_cachedit_links"]
        links.pop(controller, None)
        if not links:
            del vars(blocks)["_cachedit_links"]
            blocks.__class__ = vars(type(blocks))["_cachedit_class"]


def current_run() -> Any:
    """The cached forward that this thread is in, or None."""
    return getattr(_thread, "run", None)


class run_sections:
    """Context manager: inside, lists hand out the sites of this forward.

    Args:
        controller: The transformer's controller.
        sections: One :class:`SectionRun` per section.
    """

    __slots__ = ("controller", "outer", "sections")

    def __init__(self, controller: Any, sections: list[SectionRun]):
        self.controller = controller
        self.sections = sections

    def __enter__(self) -> run_sections:
        self.outer = current_run()
        _thread.run = self
        return self

    def __exit__(self, *exc: object) -> None:
        _thread.run = self.outer
