"""BlockAdapter: tells the cache where a model's blocks are and how they pass their streams on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from .models import MODELS, calls_branches_in_turn, find_entry
from .pattern import ForwardPattern

__all__ = ["BlockAdapter", "NamedBlocks", "TransformerPlan", "plan_for"]

Nested = Any  # one value, a list (per block list or per transformer), or a list of lists


class NamedBlocks(NamedTuple):
    """A block list with its name and pattern."""

    name: str
    blocks: nn.ModuleList
    pattern: ForwardPattern


class TransformerPlan(NamedTuple):
    """A transformer and its sections: lists in one section share a decision."""

    transformer: nn.Module
    sections: list[list[NamedBlocks]]
    check_forward_pattern: bool
    has_separate_cfg: bool


@dataclasses.dataclass
class BlockAdapter:
    """Describes the blocks of a pipeline or a transformer that the cache should serve.

    Args:
        pipe: The pipeline, if there is one: its ``progress_bar`` then tells when a request starts.
        transformer: The transformer, or a list of them (Wan 2.2). Default: ``pipe.transformer``.
        blocks: The block list; or a list of block lists in calling order; or, with several transformers, one of these
            per transformer. Default: looked up by ``blocks_name``.
        blocks_name: Name or names of the block lists within the transformer, nested like ``blocks``. Default: found
            by identity.
        forward_pattern: Pattern of the lists, nested like ``blocks``; one pattern stands for all lists.
        check_forward_pattern: Check patterns against the blocks' signatures. Default: only for blocks whose forward
            names its streams hidden_states.
        has_separate_cfg: The transformer is called once per guidance branch, in turn.
        linked: Whether all block lists of a transformer carry the same streams and share one decision, so that a
            reused step skips the later lists whole. Default: as the model table says, else False.

    Raises:
        TypeError, ValueError: When it is given to ``enable_cache``; the message names the field.
    """

    pipe: Any = None
    transformer: Nested = None
    blocks: Nested = None
    blocks_name: Nested = None
    forward_pattern: Nested = None
    check_forward_pattern: bool | None = None
    has_separate_cfg: bool = False
    linked: bool | None = None

    def plans(self) -> list[TransformerPlan]:
        """Check all fields and return one plan per transformer."""
        transformer = self.transformer
        if transformer is None:
            transformer = getattr(self.pipe, "transformer", None)
        if transformer is None:
            raise ValueError("transformer: give BlockAdapter a transformer, or a pipe that has one")
        if not isinstance(transformer, (list, tuple)):
            return [self._plan("", transformer, self.blocks, self.blocks_name, self.forward_pattern)]
        count = len(transformer)
        per_transformer = (
            _spread("blocks", self.blocks, count, nn.ModuleList),
            _spread("blocks_name", self.blocks_name, count, str),
            _spread("forward_pattern", self.forward_pattern, count, ForwardPattern),
        )
        fields = zip(transformer, *per_transformer, strict=True)
        return [self._plan(f"[{i}]", *values) for i, values in enumerate(fields)]

    def _plan(self, where: str, transformer: Any, blocks: Nested, names: Nested, patterns: Nested) -> TransformerPlan:
        if not isinstance(transformer, nn.Module):
            raise TypeError(f"transformer{where} must be a torch.nn.Module, got {type(transformer).__name__}")
        transformer = getattr(transformer, "_orig_mod", transformer)  # torch.compile's wrapper
        lists = _find_lists(where, transformer, _as_list(blocks), _as_list(names))
        chosen = _as_list(patterns)
        if not chosen:
            raise ValueError(f"forward_pattern{where} is missing; patterns are {_pattern_names()}")
        if len(chosen) == 1:
            chosen = chosen * len(lists)
        if len(chosen) != len(lists):
            raise ValueError(
                f"forward_pattern{where}: expected one pattern, or one per block list ({len(lists)}), got {len(chosen)}"
            )
        named = [
            NamedBlocks(name, blocks, _as_pattern(where, pattern))
            for (name, blocks), pattern in zip(lists, chosen, strict=True)
        ]
        return TransformerPlan(
            transformer, self._sections(where, transformer, named), self._checks(named), self.has_separate_cfg
        )

    def _sections(self, where: str, transformer: nn.Module, named: list[NamedBlocks]) -> list[list[NamedBlocks]]:
        linked = self.linked
        if linked is None:
            entry = find_entry(transformer)
            names = {item.name for item in named}
            linked = entry is not None and any(names <= {item.name for item in group} for group in entry.sections)
        if not linked or len(named) == 1:
            return [[item] for item in named]
        streams = {(frozenset(item.pattern.In), frozenset(item.pattern.Out)) for item in named}
        if len(streams) > 1:
            raise ValueError(
                f"linked{where}: block lists can only share a decision if they take and return the same "
                f"streams, got {', '.join(f'{item.name}: {item.pattern.name}' for item in named)}"
            )
        return [named]

    def _checks(self, named: list[NamedBlocks]) -> bool:
        if self.check_forward_pattern is not None:
            return self.check_forward_pattern
        return all("hidden_states" in _parameter_names(item.blocks[0]) for item in named)


def plan_for(transformer: nn.Module, pipe: Any = None) -> TransformerPlan:
    """Plan a transformer from the model table.

    Args:
        transformer: The transformer.
        pipe: The pipeline that calls it, where there is one: its class says how guidance does so.

    Raises:
        ValueError: If its class is not in the table.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)
    entry = find_entry(transformer)
    if entry is None:
        raise ValueError(
            f"{type(transformer).__name__} is not in the model table ({', '.join(sorted(MODELS))}); describe its "
            "blocks with BlockAdapter(transformer=..., blocks=..., forward_pattern=...)"
        )
    sections = [
        [NamedBlocks(item.name, _get_list("", transformer, item.name), item.pattern) for item in group]
        for group in entry.sections
    ]
    return TransformerPlan(transformer, sections, True, calls_branches_in_turn(pipe))


def _as_list(value: Nested) -> list[Any]:
    if value is None:
        return []
    # A ModuleList is itself a sequence of blocks: one value here.
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _spread(name: str, value: Nested, count: int, single: type) -> list[Nested]:
    if value is None or isinstance(value, single):
        return [value] * count
    if not isinstance(value, Sequence) or len(value) != count:
        raise ValueError(f"{name}: expected one entry per transformer ({count}), got {_describe(value)}")
    return list(value)


def _find_lists(
    where: str, transformer: nn.Module, blocks: list[Any], names: list[Any]
) -> list[tuple[str, nn.ModuleList]]:
    if not blocks and not names:
        raise ValueError(f"blocks{where}: give BlockAdapter the block list(s), or their blocks_name")
    if not blocks:
        return [(name, _get_list(where, transformer, name)) for name in names]
    for i, item in enumerate(blocks):
        if not isinstance(item, nn.ModuleList):
            raise TypeError(f"blocks{where}[{i}] must be a torch.nn.ModuleList, got {_describe(item)}")
        if len(item) == 0:
            raise ValueError(f"blocks{where}[{i}] is an empty list")
    if len({id(item) for item in blocks}) != len(blocks):
        raise ValueError(f"blocks{where}: a block list is given twice")
    if not names:
        known = {id(module): name for name, module in transformer.named_modules()}
        unknown = [i for i, item in enumerate(blocks) if id(item) not in known]
        if unknown:
            raise ValueError(f"blocks{where}[{unknown[0]}] is not a submodule of {type(transformer).__name__}")
        names = [known[id(item)] for item in blocks]
    if len(names) != len(blocks):
        raise ValueError(f"blocks_name{where}: expected one name per block list ({len(blocks)}), got {len(names)}")
    return list(zip(names, blocks, strict=True))


def _get_list(where: str, transformer: nn.Module, name: str) -> nn.ModuleList:
    try:
        blocks = transformer.get_submodule(name)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        lists = [n for n, module in transformer.named_modules() if isinstance(module, nn.ModuleList) and "." not in n]
        raise ValueError(
            f"blocks_name{where}: {type(transformer).__name__} has no block list {name!r}; "
            f"its lists are {', '.join(lists) or 'none'}"
        )
    if len(blocks) == 0:
        raise ValueError(f"blocks_name{where}: {name} is an empty list")
    return blocks


def _as_pattern(where: str, value: Any) -> ForwardPattern:
    if not isinstance(value, ForwardPattern):
        raise TypeError(f"forward_pattern{where} must be a ForwardPattern ({_pattern_names()}), got {value!r}")
    return value


def _pattern_names() -> str:
    return ", ".join(pattern.name for pattern in ForwardPattern)


def _parameter_names(block: nn.Module) -> set[str]:
    return set(inspect.signature(block.forward).parameters)


def _describe(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
