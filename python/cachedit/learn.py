"""Learning where an unknown transformer's blocks are, and what they pass on, by watching one forward.

Names and annotations do not tell what a loop does with what its blocks return; tensors do: what block i returns is, or
is not, the very object that block i + 1 is given. Where a loop does more than pass streams on, skipping blocks would
change the result, and the answer is an explanation of what was seen.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .adapter import NamedBlocks
from .blocks import Link, intercept, release, run_sections
from .pattern import BlockSignature, ForwardPattern

__all__ = ["learn_sections"]

SHARE = 3  # a list shorter than this part of the longest is a refiner or the like, and left alone


def learn_sections(
    transformer: nn.Module,
    candidates: Sequence[tuple[str, nn.ModuleList]],
    forward: Callable[[], Any],
    blocks_policy: str = "max",
) -> tuple[Any, list[list[NamedBlocks]]]:
    """Run one forward and find out which block lists can be cached, and how.

    Args:
        transformer: The transformer.
        candidates: Its block lists to look at, with their names.
        forward: Calls it, with gradients disabled.
        blocks_policy: ``"max"`` leaves lists alone that are much shorter than the longest one that can be cached;
            ``"min"`` takes the shortest only.

    Returns:
        What ``forward`` returned, and the block lists in calling order; lists that hand all their streams on to the
        next are in one group.

    Raises:
        ValueError: If no list can be cached; says what was seen of each.
    """
    watch = _Watch()
    lists = [_WatchedList(watch, i, name, blocks) for i, (name, blocks) in enumerate(candidates)]
    with ExitStack() as stack:
        if any(block._compiled_call_impl is not None for _, blocks in candidates for block in blocks):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # else the hooks are compiled with the blocks
        for watched in lists:
            stack.enter_context(watched.hooked())
        stack.enter_context(run_sections(watch, lists, None, (), {}))
        output = forward()
    found, reasons = [], []
    for watched in lists:
        if watched.calls:
            reason = watched.conclude()
            found += [watched] if reason is None else []
            reasons += [f"{watched.name}: {reason}"] if reason is not None else []
    if not found:
        seen = "; ".join(reasons) or f"its forward calls no blocks of {', '.join(name for name, _ in candidates)}"
        raise ValueError(
            f"{type(transformer).__name__} is not in the model table, and cannot be cached as it is: {seen}. Describe "
            "its blocks with BlockAdapter, and with a PatchFunctor if its loop does more than call them"
        )
    found.sort(key=lambda watched: watched.calls[0].position)
    lengths = [len(watched.blocks) for watched in found]
    if blocks_policy == "min":
        return output, _grouped([watched for watched in found if len(watched.blocks) == min(lengths)][:1])
    return output, _grouped([watched for watched in found if SHARE * len(watched.blocks) >= max(lengths)])


class _Call:
    """One call of a block."""

    def __init__(self, position: int, block: int):
        self.position = position  # among all calls of blocks in this forward
        self.block = block  # number within its list
        self.taken: dict[int, str] = {}  # which outputs of the call before it was given, and as which parameters
        self.outputs: int | None = None  # tensors in a returned tuple; None for a bare tensor, -1 for anything else
        self.kept = False  # whether somebody still held what it returned after the next block had run


class _Watch:
    """What is seen during the forward. Tensors are held until the next block is called, no longer."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.depth = 0
        self.outputs: list[torch.Tensor] = []  # of the last call
        self.before_last: list[weakref.ref[torch.Tensor]] = []  # outputs of the call before it

    def open(self, inputs: dict[str, torch.Tensor], block: int) -> _Call | None:
        """A block is called; None for one within another block."""
        self.depth += 1
        if self.depth > 1:
            return None
        call = _Call(len(self.calls), block)
        call.taken = {i: name for i, out in enumerate(self.outputs) for name, tensor in inputs.items() if tensor is out}
        alive = [tensor for tensor in (ref() for ref in self.before_last) if tensor is not None]
        if any(all(tensor is not given for given in inputs.values()) for tensor in alive):
            self.calls[-2].kept = True
        self.before_last = [weakref.ref(tensor) for tensor in self.outputs]
        self.outputs = []
        self.calls.append(call)
        return call

    def close(self, output: Any) -> None:
        """The block has returned."""
        self.depth -= 1
        if self.depth > 0:
            return
        items = [output] if isinstance(output, torch.Tensor) else output
        call = self.calls[-1]
        if not isinstance(items, (tuple, list)) or not all(isinstance(item, torch.Tensor) for item in items):
            call.outputs = -1
            return
        self.outputs = list(items)
        call.outputs = None if isinstance(output, torch.Tensor) else len(items)


class _WatchedList:
    """One block list during the forward: its link and its run in one, as far as the interception asks for them."""

    bypassed = False

    def __init__(self, watch: _Watch, index: int, name: str, blocks: nn.ModuleList):
        self.watch = watch
        self.index = index
        self.name = name
        self.blocks = blocks
        self.calls: list[_Call] = []
        self.iterated = False
        self.pattern = ForwardPattern.Pattern_3

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the list's blocks, and whether the list is iterated over."""
        handles = []
        for number, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._before(number), with_kwargs=True))
            handles.append(block.register_forward_hook(lambda _m, _a, output: self.watch.close(output)))
        intercept(self.blocks, self.watch, self)  # type: ignore[arg-type]
        try:
            yield
        finally:
            release(self.blocks, self.watch)
            for handle in handles:
                handle.remove()

    def _before(self, number: int) -> Callable[..., None]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = _parameters(block)
            given = dict(zip(names, args, strict=False)) | kwargs
            call = self.watch.open({k: v for k, v in given.items() if isinstance(v, torch.Tensor)}, number)
            if call is not None:
                self.calls.append(call)

        return before

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[nn.Module]:
        """The list is iterated over: hand out the blocks themselves."""
        self.iterated = True
        yield from blocks

    def close(self) -> None:
        """Nothing to do."""

    def conclude(self) -> str | None:
        """Find the pattern; return why the list cannot be cached, or None if it can."""
        order = [call.block for call in self.calls]
        if order != list(range(len(self.blocks))):
            return f"its {len(self.blocks)} blocks were called in the order {order}"
        if not self.iterated:
            return "blocks are fetched by index, not by iterating over the list"
        if self.calls[-1].position - self.calls[0].position != len(order) - 1:
            return "blocks of another list were called in between"
        kept = [call.block for call in self.calls[:-1] if call.kept]  # what leaves the list is there on every step
        if kept:
            return f"what block {kept[0]} returned was kept for later, as for a skip connection"
        if any(call.outputs not in (None, 2) for call in self.calls):
            return "blocks return something else than a tensor or two tensors"
        rest = self.calls[1:]
        if any(not call.taken for call in rest):
            first = next(call.block for call in rest if not call.taken)
            return f"block {first} is not given what block {first - 1} returned: the loop does something in between"
        if any((call.taken, call.outputs) != (rest[0].taken, self.calls[0].outputs) for call in rest):
            return "blocks do not all pass on the same streams"
        return self._find_pattern(rest[0].taken)

    def _find_pattern(self, taken: dict[int, str]) -> str | None:
        """Set the pattern by which outputs are taken as which parameters."""
        signature = BlockSignature(self.blocks[0], ForwardPattern.Pattern_0, check=False)
        hidden, encoder = signature.hidden_name, signature.encoder_name
        by_name = {name: i for i, name in taken.items()}
        if hidden not in by_name or not set(by_name) <= {hidden, encoder}:
            return f"blocks take what they return as {', '.join(by_name)}, where {hidden} is expected to be the stream"
        first = by_name[hidden] == 0
        if self.calls[0].outputs is None:
            named = encoder == "encoder_hidden_states" and encoder in _parameters(self.blocks[0])
            self.pattern = ForwardPattern.Pattern_2 if named else ForwardPattern.Pattern_3
        elif encoder in by_name:
            self.pattern = ForwardPattern.Pattern_0 if first else ForwardPattern.Pattern_1
        else:
            self.pattern = ForwardPattern.Pattern_4 if first else ForwardPattern.Pattern_5
        return None


def _parameters(block: nn.Module) -> list[str]:
    return list(inspect.signature(block.forward).parameters)


def _grouped(found: list[_WatchedList]) -> list[list[NamedBlocks]]:
    """Lists share a group where the second begins with all that the first ends with."""
    groups: list[list[NamedBlocks]] = []
    for i, watched in enumerate(found):
        item = NamedBlocks(watched.name, watched.blocks, watched.pattern)
        before = found[i - 1] if i > 0 else None
        if before is not None and _linked(before, watched):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _linked(before: _WatchedList, after: _WatchedList) -> bool:
    first = after.calls[0]
    return (
        first.position == before.calls[-1].position + 1
        and set(before.pattern.In) == set(after.pattern.In)
        and set(before.pattern.Out) == set(after.pattern.Out)
        and len(first.taken) == len(before.pattern.Out)
        and not before.calls[-1].kept  # a reused step would skip what the first list returns
    )
