"""Sequence parallelism outside of attention: each rank holds a piece of every sequence.

A plan says which tensors are split on their way into which module, and which are gathered on the way out. It has the
form of diffusers' ``_cp_plan``. Pieces follow from a tensor's whole length alone (:func:`even_splits`), and the lengths
that other ranks have in attention follow from the lengths that were split: nothing is sent to agree on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from cachedit_kernels.ulysses.layout import even_splits

from ..blocks import SPLIT
from .groups import all_gather

__all__ = ["Pieces", "hook_plan"]


class Pieces:
    """What a rank knows, during one forward, of the sequences that it holds a piece of.

    Args:
        group: Its members hold the pieces in their order.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.count = dist.get_world_size(group)
        self.mine = dist.get_rank(group)
        self.forget()

    def forget(self) -> None:
        """A forward begins."""
        self.streams: dict[str, int] = {}  # what was split, and how long it was
        self.gathered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: a piece, and the whole of it

    def split(self, tensor: torch.Tensor, dim: int, name: str | None = None) -> torch.Tensor:
        """This rank's piece. ``name`` is given for what attention may run over."""
        total = tensor.shape[dim]
        if name is not None:
            self.streams[name] = total
        sizes = even_splits(total, self.count)
        return tensor.narrow(dim, sum(sizes[: self.mine]), sizes[self.mine])

    def lengths(self, length: int) -> tuple[int, ...]:
        """Lengths of the pieces of the sequence of which this rank's is ``length`` tokens long.

        The sequence is one of those that were split, or several of them joined piece by piece. Where lengths are so
        close to each other that some rank could take one for another - which all ranks know - they ask each other.

        Raises:
            RuntimeError: If no sequence that was split has a piece of this length.
        """
        table = _joined(tuple(sorted(self.streams.values())), self.count)
        matching = [sizes for sizes in table if sizes[self.mine] == length]
        if not matching:
            raise RuntimeError(
                f"attention runs over {length} tokens on rank {self.mine} of {self.count}, which is no piece of what "
                f"the plan splits: {self.streams or 'nothing'}"
            )
        if table[matching[0]]:
            return matching[0]
        everyone: list[int] = [0] * self.count
        dist.all_gather_object(everyone, length, group=self.group)
        return tuple(everyone)

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """The whole of what each rank has a piece of, in one collective."""
        sizes = self.lengths(tensor.shape[dim]) if sizes is None else sizes
        longest = max(sizes)
        first = tensor.movedim(dim, 0)
        padded = first.new_zeros(longest, *first.shape[1:])
        padded[: first.shape[0]] = first
        everyone = padded.new_empty(self.count * longest, *padded.shape[1:])
        all_gather(everyone, padded, group=self.group)
        pieces = [piece[:size] for piece, size in zip(everyone.split(longest), sizes, strict=True)]
        return torch.cat(pieces).movedim(0, dim)

    def gather_mask(self, mask: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The whole of a mask over keys; once per forward, however many layers are given the same tensor."""
        known = self.gathered.get(id(mask))
        if known is None:
            known = self.gathered[id(mask)] = mask, self.gather(mask, mask.dim() - 1, sizes)
        return known[1]


@lru_cache(maxsize=256)
def _joined(lengths: tuple[int, ...], count: int) -> dict[tuple[int, ...], bool]:
    """Sizes of the pieces of each sequence, and of each choice of several joined; whether they can't be mistaken."""
    splits = [even_splits(length, count) for length in lengths]
    sums = {
        tuple(map(sum, zip(*chosen, strict=True)))
        for number in range(1, len(splits) + 1)
        for chosen in combinations(splits, number)
    }
    return {sizes: not any(other != sizes and any(map(int.__eq__, sizes, other)) for other in sums) for sizes in sums}


class _Split:
    """Splits inputs of one module, or what it returns.

    Args:
        module: The module.
        name: What errors and ``Pieces`` call it.
        entries: By the name of a parameter, or by the index of an output, how it is split (``ContextParallelInput``).
    """

    def __init__(self, pieces: Pieces, module: nn.Module, name: str, entries: dict[Any, Any]):
        self.pieces = pieces
        self.name = name
        self.inputs = {key: entry for key, entry in entries.items() if isinstance(key, str)}
        self.outputs = {key: entry for key, entry in entries.items() if not isinstance(key, str)}
        self.parameters = list(inspect.signature(module.forward).parameters)
        unknown = [key for key in self.inputs if key not in self.parameters]
        if unknown:
            raise ValueError(
                f"cp_plan: forward of {name or type(module).__name__} has no parameter {unknown[0]!r}; "
                f"it has {', '.join(self.parameters)}"
            )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = list(args)
        for name, entry in self.inputs.items():
            place = self.parameters.index(name)
            if name in kwargs:
                kwargs[name] = self._one(kwargs[name], entry, name)
            elif place < len(given):
                given[place] = self._one(given[place], entry, name)
        return tuple(given), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, entry in self.outputs.items():
            outputs[index] = self._one(outputs[index], entry, None)
        return outputs[0] if isinstance(output, torch.Tensor) else type(output)(outputs)

    def stream(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stream as the module will see it; for the cache, which is given what the module is given."""
        entry = self.inputs.get(name)
        return tensor if entry is None else self._one(tensor, entry, name)

    def _one(self, value: Any, entry: Any, name: str | None) -> Any:
        if isinstance(value, (list, tuple)):
            entries = entry if isinstance(entry, (list, tuple)) else [entry] * len(value)
            return type(value)(self._one(item, e, name) for item, e in zip(value, entries, strict=True))
        if not isinstance(value, torch.Tensor) or value.dim() != (entry.expected_dims or value.dim()):
            return value
        # Attention runs over features, [batch, tokens, channels]; masks and positions go with them.
        is_stream = name is not None and value.dim() > 2 and value.is_floating_point()
        return self.pieces.split(value, entry.split_dim, f"{self.name}.{name}" if is_stream else None)


class _Gather:
    """Gathers what one module returns."""

    def __init__(self, pieces: Pieces, entries: Sequence[Any]):
        self.pieces = pieces
        self.entries = entries

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, entry in enumerate(self.entries):
            if entry is not None:
                outputs[index] = self.pieces.gather(outputs[index], entry.gather_dim)
        return outputs[0] if isinstance(output, torch.Tensor) else type(output)(outputs)


def hook_plan(root: nn.Module, plan: dict[str, Any], pieces: Pieces) -> Callable[[], None]:
    """Have a model split and gather as a plan says; returns what undoes it.

    Raises:
        ValueError: For a module or a parameter that the model does not have. Nothing is changed then.
    """
    hooks: list[tuple[nn.Module, _Split | _Gather]] = []
    for name, entries in plan.items():
        for path, module in _modules(root, name):
            if isinstance(entries, dict):
                hooks.append((module, _Split(pieces, module, path, entries)))
            else:
                hooks.append((module, _Gather(pieces, entries if isinstance(entries, (list, tuple)) else [entries])))
    handles: list[RemovableHandle] = [root.register_forward_pre_hook(lambda *_: pieces.forget())]
    marked = []
    for module, hook in hooks:
        if isinstance(hook, _Split) and hook.inputs:
            handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            if module is not root and SPLIT not in vars(module):
                vars(module)[SPLIT] = hook
                marked.append(module)
        if isinstance(hook, _Gather) or hook.outputs:
            handles.append(module.register_forward_hook(hook.after))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for module in marked:
            vars(module).pop(SPLIT, None)

    return undo


def _modules(root: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The modules that a plan's key means; ``blocks.*`` are all blocks, ``blocks.*.attn`` a part of each."""
    before, star, after = name.partition("*")
    try:
        if not star:
            return [(name, root.get_submodule(name))]
        return [
            (f"{before}{child}{after}", root.get_submodule(f"{before}{child}{after}"))
            for child, _ in root.get_submodule(before.rstrip(".")).named_children()
        ]
    except AttributeError as error:
        raise ValueError(f"cp_plan: {type(root).__name__} has no module {name!r}") from error
