"""Sequence parallelism outside of attention: each rank holds a piece of every sequence.

A plan says which tensors are split on their way into which module, and which are gathered on the way out. It has the
form of diffusers' ``_cp_plan``. Pieces follow from a tensor's whole length alone (:func:`even_splits`), and the lengths
that other ranks have in attention follow from the lengths that were split: nothing is sent to agree on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
from .plans import Tokens

__all__ = ["Pieces", "hook_plan"]


class Pieces:
    """What a rank knows, during one forward, of the sequences that it holds a piece of.

    Args:
        group: Its members hold the pieces in their order.
        joined: Names of the sequences that the model's attention joins, in the order in which masks cover them.
    """

    def __init__(self, group: dist.ProcessGroup, joined: tuple[str, ...] = ()):
        self.group = group
        self.joined = joined
        self.count = dist.get_world_size(group)
        self.mine = dist.get_rank(group)
        self.forget()

    def forget(self) -> None:
        """A forward begins."""
        self.streams: dict[str, tuple[int, ...]] = {}  # what was split, and how long each rank's piece is
        self.last_mask: tuple[torch.Tensor, torch.Tensor] | None = None  # as it was given, and as attention takes it
        self.last_valid: torch.Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether this rank has no token of some sequence."""
        return any(sizes[self.mine] == 0 for sizes in self.streams.values())

    def split(self, tensor: torch.Tensor, dim: int, name: str | None = None) -> torch.Tensor:
        """This rank's piece. ``name`` is given for what attention may run over."""
        sizes = even_splits(tensor.shape[dim], self.count)
        if name is not None:
            self.streams[name] = sizes
        return tensor.narrow(dim, sum(sizes[: self.mine]), sizes[self.mine])

    def own_of(self, tokens: int, name: str, last: bool) -> int:
        """How many of so many first, or last, tokens of a sequence that was split this rank holds."""
        sizes = self.streams[name]
        before, own = sum(sizes[: self.mine]), sizes[self.mine]
        return max(0, min(own, before + own + tokens - sum(sizes) if last else tokens - before))

    def note_valid(self, mask: torch.Tensor, name: str) -> None:
        """Attention will leave out what a mask [batch, tokens] excludes, one sample at a time."""
        if mask is self.last_valid:  # the block before had it
            return
        self.last_valid = mask
        parts = mask.bool().split(even_splits(mask.shape[1], self.count), dim=1)
        for sample, sizes in enumerate(torch.stack([part.sum(1) for part in parts], 1).tolist()):
            self.streams[f"{name}[{sample}]"] = tuple(sizes)

    def lengths(self, length: int) -> tuple[int, ...]:
        """Lengths of the pieces of the sequence of which this rank's is ``length`` tokens long.

        The sequence is one of those that were split, or several of them joined piece by piece. Where lengths are so
        close to each other that some rank could take one for another - which all ranks know - they ask each other.

        Raises:
            RuntimeError: If no sequence that was split has a piece of this length.
        """
        table = _joined(tuple(sorted(self.streams.values())))
        matching = [sizes for sizes in table if sizes[self.mine] == length]
        if not matching:
            raise RuntimeError(
                f"attention runs over {length} tokens on rank {self.mine} of {self.count}, which is no piece of what "
                f"the plan splits: {({name: sum(sizes) for name, sizes in self.streams.items()}) or 'nothing'}"
            )
        if table[matching[0]]:
            return matching[0]
        everyone: list[int] = [0] * self.count
        dist.all_gather_object(everyone, length, group=self.group)
        return tuple(everyone)

    def gather(self, tensor: torch.Tensor, dim: int, joined: bool = False) -> torch.Tensor:
        """The whole of what each rank has a piece of, in one collective; joined sequences one after the other."""
        sizes = self.lengths(tensor.shape[dim])
        whole = self._in_pieces(tensor, dim, sizes)
        order = self._order(sizes, tensor.device) if joined else None
        return whole if order is None else whole.index_select(dim, order.argsort())

    def _in_pieces(self, tensor: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
        """All ranks' pieces, one after the other."""
        longest = max(sizes)
        first = tensor.movedim(dim, 0)
        padded = first.new_zeros(longest, *first.shape[1:])
        padded[: first.shape[0]] = first
        everyone = padded.new_empty(self.count * longest, *padded.shape[1:])
        all_gather(everyone, padded, group=self.group)
        pieces = [piece[:size] for piece, size in zip(everyone.split(longest), sizes, strict=True)]
        return torch.cat(pieces).movedim(0, dim)

    def _order(self, sizes: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
        """Where joined sequences, one after the other, have the tokens of one rank's pieces after the other's.

        None where pieces of these sizes are not those of several joined sequences: the order is the same then.
        """
        streams = [self.streams[name] for name in self.joined if name in self.streams]
        if len(streams) < 2 or tuple(map(sum, zip(*streams, strict=True))) != sizes:
            return None
        return torch.cat([token for rank in self._tokens(streams, device) for token in rank])

    def _tokens(self, streams: list[tuple[int, ...]], device: torch.device) -> list[tuple[torch.Tensor, ...]]:
        """By rank: where its pieces are in joined sequences, one after the other."""
        sizes = [size for stream in streams for size in stream]
        places = torch.arange(sum(sizes), device=device).split(sizes)
        return [places[rank :: self.count] for rank in range(self.count)]

    def split_joined(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's pieces of what goes with joined sequences, one after the other."""
        streams = [self.streams[name] for name in self.joined]
        return tensor.index_select(dim, torch.cat(self._tokens(streams, tensor.device)[self.mine]))

    def mask(self, mask: torch.Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> torch.Tensor:
        """A mask over all ranks' tokens, one rank's piece after the other; made once for layers given one tensor.

        Args:
            mask: [B, Lk], [B, Lq, Lk] or [B, 1, Lq, Lk], where Lq may be 1. Either over all tokens, in the order of
                the model, or over those of this rank: then over keys alone, or boolean and square, made of one over
                keys: what lets a token be seen is on the diagonal. What it sees otherwise when it is not to be
                seen itself is left out, as nobody looks at it.
            rows, columns: Sizes of the pieces of queries and keys.

        Returns:
            [B, 1, 1 or Lq, Lk].

        Raises:
            ValueError: For other shapes.
        """
        if self.last_mask is None or self.last_mask[0] is not mask:
            self.last_mask = mask, self._whole_mask(mask, rows, columns)
        return self.last_mask[1]

    def _whole_mask(self, given: torch.Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> torch.Tensor:
        mask = given[:, None, None] if given.dim() == 2 else given[:, None] if given.dim() == 3 else given
        heads, queries, keys = mask.shape[1:]
        here = rows[self.mine], columns[self.mine]
        if keys == here[1] and queries == here[0] == here[1] and mask.dtype is torch.bool:
            mask, queries = mask.diagonal(dim1=2, dim2=3)[:, :, None], 1
        if heads == queries == 1 and keys == here[1]:
            return self._in_pieces(mask, 3, columns)
        if heads != 1 or queries not in (1, sum(rows)) or keys != sum(columns):
            raise ValueError(
                f"attention masks must be over all {sum(columns)} keys, or over the {here[1]} keys of this rank and "
                f"the same for all queries and heads, under sequence parallelism; got {tuple(given.shape)}"
            )
        for dim, sizes in ((2, rows), (3, columns)):
            order = self._order(sizes, mask.device) if mask.shape[dim] == sum(sizes) else None
            mask = mask if order is None else mask.index_select(dim, order)
        return mask


@lru_cache(maxsize=256)
def _joined(splits: tuple[tuple[int, ...], ...]) -> dict[tuple[int, ...], bool]:
    """Sizes of the pieces of each sequence, and of each choice of several joined; whether they can't be mistaken."""
    sums = {
        tuple(map(sum, zip(*chosen, strict=True)))
        for number in range(1, len(splits) + 1)
        for chosen in combinations(splits, number)
    }
    return {
        sizes: not any(other != sizes and any(a == b for a, b in zip(sizes, other, strict=True)) for other in sums)
        for sizes in sums
    }


class _Split:
    """Splits and gathers inputs of one module, and what it returns.

    Args:
        module: The module.
        name: Its key in the plan.
        entries: By the name of a parameter, or by the index of an output: how it is split (``ContextParallelInput``)
            or gathered (``ContextParallelOutput``), or a number of tokens (``Tokens``).
    """

    def __init__(self, pieces: Pieces, module: nn.Module, name: str, entries: dict[Any, Any]):
        self.pieces = pieces
        self.name = name
        self.inputs = {key: entry for key, entry in entries.items() if isinstance(key, str)}
        self.outputs = {key: entry for key, entry in entries.items() if not isinstance(key, str) and entry is not None}
        parameters = inspect.signature(module.forward).parameters
        self.parameters = list(parameters)
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [key for key in self.inputs if key not in parameters and not takes_more]
        if unknown:
            raise ValueError(
                f"cp_plan: forward of {name or type(module).__name__} has no parameter {unknown[0]!r}; "
                f"it has {', '.join(self.parameters)}"
            )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = list(args)
        for name, entry in self.inputs.items():
            if name in kwargs:
                kwargs[name] = self._one(kwargs[name], entry, name)
            elif name in self.parameters[: len(given)]:
                place = self.parameters.index(name)
                given[place] = self._one(given[place], entry, name)
        return tuple(given), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, entry in self.outputs.items():
            outputs[index] = self._one(outputs[index], entry, index)
        return outputs[0] if isinstance(output, torch.Tensor) else type(output)(outputs)

    def stream(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stream as the module will see it; for the cache, which is given what the module is given."""
        entry = self.inputs.get(name)
        return tensor if entry is None else self._one(tensor, entry, name)

    def _one(self, value: Any, entry: Any, name: str | int | None) -> Any:
        if isinstance(value, (list, tuple)):
            entries = entry if isinstance(entry, (list, tuple)) else [entry] * len(value)
            return type(value)(self._one(item, e, None) for item, e in zip(value, entries, strict=True))
        if isinstance(value, dict):
            return {key: self._one(item, entry, None) for key, item in value.items()}
        if isinstance(value, int) and isinstance(entry, Tokens):
            return self.pieces.own_of(value, entry.stream, entry.last)
        if not isinstance(value, torch.Tensor) or value.dim() != (getattr(entry, "expected_dims", 0) or value.dim()):
            return value
        if hasattr(entry, "gather_dim"):
            return self.pieces.gather(value, entry.gather_dim, getattr(entry, "joined", False))
        if getattr(entry, "joined", False):
            return self.pieces.split_joined(value, entry.split_dim)
        if getattr(entry, "valid", False):
            self.pieces.note_valid(value, f"{self.name}.{name}")
        stream = getattr(entry, "stream", None)
        if stream is None:  # Attention runs over features, [batch, tokens, channels]; masks and positions go with them.
            stream = isinstance(name, str) and value.dim() > 2 and value.is_floating_point()
        return self.pieces.split(value, entry.split_dim, f"{self.name}.{name}" if stream else None)


def hook_plan(root: nn.Module, plan: dict[str, Any], pieces: Pieces) -> Callable[[], None]:
    """Have a model split and gather as a plan says; returns what undoes it.

    Raises:
        ValueError: For a module or a parameter that the model does not have. Nothing is changed then.
    """
    hooks: list[tuple[nn.Module, _Split]] = []
    for name, given in plan.items():
        entries = given
        if not isinstance(given, dict):
            entries = dict(enumerate(given if isinstance(given, (list, tuple)) else [given]))
        hooks += [(module, _Split(pieces, module, name, entries)) for module in _modules(root, name)]
    handles: list[RemovableHandle] = [root.register_forward_pre_hook(lambda *_: pieces.forget())]
    marked = []
    for module, hook in hooks:
        whole = any(hasattr(entry, "gather_dim") for entry in hook.outputs.values())
        if hook.inputs:
            handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            if module is not root and not whole and SPLIT not in vars(module):
                vars(module)[SPLIT] = hook
                marked.append(module)
        if hook.outputs:
            handles.append(module.register_forward_hook(hook.after))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for module in marked:
            vars(module).pop(SPLIT, None)

    return undo


def _modules(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a plan's key means; ``blocks.*`` are all blocks, ``blocks.*.attn`` a part of each."""
    before, star, after = name.partition("*")
    try:
        if not star:
            return [root.get_submodule(name)]
        children = root.get_submodule(before.rstrip(".")).named_children()
        return [root.get_submodule(f"{before}{child}{after}") for child, _ in children]
    except AttributeError as error:
        raise ValueError(f"cp_plan: {type(root).__name__} has no module {name!r}") from error
