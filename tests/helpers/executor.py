"""Carries out a mask on a running pipeline with plain forward hooks; shares nothing with the engine.

All blocks run in every step. Where the mask has a 0, what the last body block of a section returns is replaced by the
body's input plus a Taylor expansion of the body's residual, kept as a ladder of derivatives.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cachedit import ForwardPattern
from cachedit.adapter import NamedBlocks

Streams = dict[str, Tensor]


class SectionExecutor:
    """One section: block lists whose blocks are numbered through; the first ``Fn`` and last ``Bn`` always count."""

    def __init__(self, lists: Sequence[NamedBlocks], order: int, Fn: int, Bn: int):
        blocks = [(block, item.pattern) for item in lists for block in item.blocks]
        first = next(item for item in lists if blocks[Fn][0] in list(item.blocks))
        self.names = dict(zip(("hidden_states", "encoder_hidden_states"), first.streams))
        self.head_end, self.body, self.order = blocks[Fn - 1], blocks[Fn : len(blocks) - Bn], order
        self.ladders: dict[int, list[Streams]] = {}  # per branch
        self.last: dict[int, int] = {}

    def begin(self, branch: int, step: int, compute: bool) -> None:
        self.branch, self.step, self.compute = branch, step, compute
        if step == 0:
            self.ladders.pop(branch, None)

    def hook(self, stack: ExitStack) -> None:
        (first, _), (last, _) = self.body[0], self.body[-1]
        for handle in (
            self.head_end[0].register_forward_hook(self._leave_head),
            first.register_forward_pre_hook(self._enter, with_kwargs=True),
            last.register_forward_hook(self._leave),
        ):
            stack.callback(handle.remove)

    def _leave_head(self, block: nn.Module, args: Any, output: Any) -> None:
        self.streams = _named(self.head_end[1], output)

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        parameters = list(inspect.signature(block.forward).parameters)
        given = dict(zip(parameters, args)) | kwargs
        given = {stream: given[self.names[stream]] for stream in self.body[0][1].Out if self.names[stream] in given}
        self.streams = {name: value.clone() for name, value in (self.streams | given).items() if value is not None}

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        pattern = self.body[-1][1]
        streams = self.streams
        ladder, gap = self.ladders.get(self.branch, []), self.step - self.last.get(self.branch, 0)
        if ladder and any(rung.shape != streams[name].shape for name, rung in ladder[0].items()):
            ladder = []
        if self.compute or not ladder:
            outputs = _named(pattern, output)
            rungs = [{name: value - streams[name] for name, value in outputs.items()}]
            for i in range(min(self.order, len(ladder))):
                rungs.append({name: (rungs[i][name] - ladder[i][name]) / gap for name in outputs})
            self.ladders[self.branch], self.last[self.branch] = rungs, self.step
            return output
        for i, rung in enumerate(ladder):
            streams = {name: streams[name] + rung[name] * gap**i / math.factorial(i) for name in rung}
        ordered = tuple(streams.get(name) for name in pattern.Out)
        return ordered[0] if len(ordered) == 1 else ordered


@contextmanager
def executing(
    sections: dict[nn.Module, list[list[NamedBlocks]]],
    mask: Sequence[int],
    branches: int,
    order: int = 1,
    Fn: int = 1,
    Bn: int = 0,
) -> Iterator[None]:
    """Inside, each transformer's calls follow the mask; with ``branches`` > 1 they belong to the branches in turn."""
    with ExitStack() as stack:
        for transformer, groups in sections.items():
            executors = [SectionExecutor(group, order, Fn, Bn) for group in groups]
            calls = iter(range(10**6))

            def begin(
                module: nn.Module,
                args: Any,
                executors: list[SectionExecutor] = executors,
                calls: Iterator[int] = calls,
            ) -> None:
                step, branch = divmod(next(calls), branches)
                step %= len(mask)  # a pipeline may run several loops
                for executor in executors:
                    executor.begin(branch, step, bool(mask[step]))

            stack.callback(transformer.register_forward_pre_hook(begin).remove)
            for executor in executors:
                executor.hook(stack)
        yield


def _named(pattern: ForwardPattern, output: Any) -> Streams:
    named = zip(pattern.Out, output if isinstance(output, tuple) else (output,))
    return {name: value for name, value in named if value is not None}
