"""BlockAdapter: tells the cache where a model's blocks are and how they pass their streams on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from .auto import Search
from .models import MODELS, UNCOVERED, calls_branches_in_turn, find_entry
from .modifier import ParamsModifier, modifiers_per_transformer
from .patch_functor import PatchFunctor
from .pattern import ForwardPattern, check_outputs

__all__ = ["BlockAdapter", "NamedBlocks", "TransformerPlan", "plan_for", "plan_or_learn", "unwrapped"]

_PREFIXES = ["transformer", "single_transformer", "blocks", "layers", "single_stream_blocks", "double_stream_blocks"]
_SUFFIXES = ["TransformerBlock"]
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")  # keep what they wrap as `module`

Nested = Any  # one value, a list (per block list or per transformer), or a list of lists


class NamedBlocks(NamedTuple):
    """A block list with its name and pattern, and what its blocks call the two streams."""

    name: str
    blocks: nn.ModuleList
    pattern: ForwardPattern
    streams: tuple[str, str] = ("hidden_states", "encoder_hidden_states")


class TransformerPlan(NamedTuple):
    """A transformer and its sections: lists in one section share a decision.

    ``modifiers`` has one entry per block list, through all sections in order. Where ``search`` is set there are no
    sections yet: they are learnt from the first forward. ``denoises`` is as in :class:`BlockAdapter`.
    """

    transformer: nn.Module
    sections: list[list[NamedBlocks]]
    check_forward_pattern: bool
    has_separate_cfg: bool
    modifiers: list[ParamsModifier | None]
    patch_functor: PatchFunctor | None = None
    search: Search | None = None
    denoises: Callable[..., bool] | None = None


@dataclasses.dataclass
class BlockAdapter:
    """Describes the blocks of a pipeline or a transformer that the cache should serve.

    Nothing is looked at or changed before the adapter is given to ``enable_cache``.

    Args:
        pipe: The pipeline, if there is one: its ``progress_bar`` then tells when a request starts.
        transformer: The transformer, or a list of them (Wan 2.2). Default: ``pipe.transformer``.
        blocks: The block list; or a list of block lists in calling order; or, with several transformers, one of these
            per transformer. Default: looked up by ``blocks_name``.
        blocks_name: Name or names of the block lists within the transformer, nested like ``blocks``. Default: found
            by identity.
        unique_blocks_name: Without effect: block lists stay where they are and need no other names.
        dummy_blocks_names: Without effect: no list is replaced by a dummy.
        forward_pattern: Pattern of the lists, nested like ``blocks``; one pattern stands for all lists.
        params_modifiers: ``ParamsModifier`` objects or None, nested like ``blocks``; one stands for all lists.
        check_forward_pattern: Check patterns against the names of the blocks' parameters. Default: only for blocks
            whose forward names its streams hidden_states.
        check_num_outputs: Check patterns against the blocks' return annotations as well.
        patch_functor: Patches the transformers when the cache is enabled; undone when it is disabled.
        has_separate_cfg: The transformer is called once per guidance branch, in turn.
        auto: Where neither ``blocks`` nor ``blocks_name`` is given, learn the block lists and their patterns by
            watching the first forward, among the lists that the next four fields allow. A ``forward_pattern`` that is
            given has to be what is seen. The first forward raises a ValueError where it shows something that caching
            would break.
        allow_prefixes: Beginnings of the names of block lists.
        check_prefixes: Whether ``allow_prefixes`` matter.
        allow_suffixes: Ends of the class names of blocks.
        check_suffixes: Whether ``allow_suffixes`` matter.
        blocks_policy: ``"max"`` leaves lists alone that are much shorter than the longest; ``"min"`` takes the
            shortest.
        skip_post_init: Without effect: nothing is done when an adapter is made.
        linked: Whether all block lists of a transformer carry the same streams and share one decision, so that a
            reused step skips the later lists whole. Default: as the model table says, else False.
        denoises: Called with the arguments of each call of a transformer: whether it is a denoising step. Other calls,
            as of a language model that reads the prompt, run as if there were no cache. Default: all are.

    Raises:
        TypeError, ValueError: When it is given to ``enable_cache``; the message names the field.
    """

    pipe: Any = None
    transformer: Nested = None
    blocks: Nested = None
    blocks_name: Nested = None
    unique_blocks_name: Nested = dataclasses.field(default_factory=list)
    dummy_blocks_names: Nested = dataclasses.field(default_factory=list)
    forward_pattern: Nested = None
    params_modifiers: Nested = None
    check_forward_pattern: bool | None = None
    check_num_outputs: bool = False
    patch_functor: PatchFunctor | None = None
    has_separate_cfg: bool = False
    auto: bool = False
    allow_prefixes: list[str] = dataclasses.field(default_factory=_PREFIXES.copy)
    check_prefixes: bool = True
    allow_suffixes: list[str] = dataclasses.field(default_factory=_SUFFIXES.copy)
    check_suffixes: bool = False
    blocks_policy: str = "max"
    skip_post_init: bool = False
    linked: bool | None = None
    denoises: Callable[..., bool] | None = None

    @staticmethod
    def is_cached(pipe_or_adapter: Any) -> bool:
        """Whether the cache is enabled on a pipeline, a transformer, or on what an adapter describes."""
        from .targets import controllers_of  # which imports this module

        return bool(controllers_of(pipe_or_adapter))

    def plans(self) -> list[TransformerPlan]:
        """Check all fields and return one plan per transformer."""
        transformer = self.transformer
        if transformer is None:
            transformer = getattr(self.pipe, "transformer", None)
        if transformer is None:
            raise ValueError("transformer: give BlockAdapter a transformer, or a pipe that has one")
        if not (self.denoises is None or callable(self.denoises)):
            raise TypeError(f"denoises must be a function of a call's arguments, got {_describe(self.denoises)}")
        transformers = list(transformer) if isinstance(transformer, (list, tuple)) else [transformer]
        if not transformers:
            raise ValueError("transformer must not be an empty list")
        self._check_settings()
        fields = (
            _per_transformer(name, getattr(self, name), len(transformers))
            for name in ("blocks", "blocks_name", "forward_pattern")
        )
        where = [""] if len(transformers) == 1 else [f"[{i}]" for i in range(len(transformers))]
        plans = [self._plan(*values) for values in zip(where, transformers, *fields, strict=True)]
        if len({id(plan.transformer) for plan in plans}) != len(plans):
            raise ValueError("transformer: a transformer is given twice")
        modifiers = modifiers_per_transformer(self.params_modifiers, [len(plan.modifiers) for plan in plans])
        return [
            plan._replace(modifiers=chosen, denoises=self.denoises)
            for plan, chosen in zip(plans, modifiers, strict=True)
        ]

    def _check_settings(self) -> None:
        """Check the fields that do not belong to single transformers or lists."""
        for name in ("check_num_outputs", "has_separate_cfg", "auto", "check_prefixes", "check_suffixes"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("check_forward_pattern", "linked"):
            if not isinstance(getattr(self, name), bool | None):
                raise TypeError(f"{name} must be True, False or None, got {getattr(self, name)!r}")
        for name in ("allow_prefixes", "allow_suffixes"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"{name} must be a list of texts, got {value!r}")

    def _plan(self, where: str, transformer: Any, blocks: Nested, names: Nested, patterns: Nested) -> TransformerPlan:
        if not isinstance(transformer, nn.Module):
            raise TypeError(f"transformer{where} must be a torch.nn.Module, got {type(transformer).__name__}")
        transformer = unwrapped(transformer)
        if not isinstance(self.patch_functor, PatchFunctor | None):
            raise TypeError(f"patch_functor must be a PatchFunctor, got {_describe(self.patch_functor)}")
        if self.auto and blocks is None and names is None:
            search = self._search(where, patterns)
            return _unknown(transformer, search, self.has_separate_cfg)._replace(patch_functor=self.patch_functor)
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
            _named(transformer, name, blocks, _as_pattern(where, pattern))
            for (name, blocks), pattern in zip(lists, chosen, strict=True)
        ]
        if self.check_num_outputs:
            for item in named:
                check_outputs(item.blocks[0], item.pattern)
        return TransformerPlan(
            transformer,
            self._sections(where, transformer, named),
            self._checks(named),
            self.has_separate_cfg,
            [None] * len(lists),
            self.patch_functor,
        )

    def _search(self, where: str, patterns: Nested) -> Search:
        values = _as_list(patterns)
        if len(values) > 1:
            raise ValueError(f"forward_pattern{where}: with auto one pattern stands for all lists, got {len(values)}")
        return Search(
            tuple(self.allow_prefixes),
            self.check_prefixes,
            tuple(self.allow_suffixes),
            self.check_suffixes,
            self.blocks_policy,
            _as_pattern(where, values[0]) if values else None,
        )

    def _sections(self, where: str, transformer: nn.Module, named: list[NamedBlocks]) -> list[list[NamedBlocks]]:
        if self.linked is None:
            return _sections_by_table(transformer, named)
        if not self.linked:
            return [[item] for item in named]
        if len({_streams(item) for item in named}) > 1:
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
    transformer = unwrapped(transformer)
    entry = find_entry(transformer)
    if entry is None:
        name = type(transformer).__name__
        raise ValueError(
            f"{name} is not in the model table of {len(MODELS)} classes, cachedit.models.MODELS"
            f"{f' ({UNCOVERED[name]})' if name in UNCOVERED else ''}; describe its blocks "
            "with BlockAdapter(transformer=..., blocks=..., forward_pattern=...)"
        )
    sections = [
        [_named(transformer, item.name, _get_list("", transformer, item.name), item.pattern) for item in group]
        for group in entry.sections
    ]
    separate = calls_branches_in_turn(pipe, transformer)
    patch = None if entry.patch is None else entry.patch()
    return TransformerPlan(transformer, sections, True, separate, [None] * sum(map(len, sections)), patch)


def plan_or_learn(transformer: nn.Module, pipe: Any = None) -> TransformerPlan:
    """Plan a transformer from the model table, or by watching its first forward where its class is not in it.

    Raises:
        ValueError: If it has no list of blocks to look at, or is known not to be covered.
    """
    transformer = unwrapped(transformer)
    if find_entry(transformer) is not None or type(transformer).__name__ in UNCOVERED:
        return plan_for(transformer, pipe)
    return _unknown(transformer, Search(), calls_branches_in_turn(pipe, transformer))


def unwrapped(module: Any) -> Any:
    """What is within the wrappers that torch puts around a module: to compile it, or to share it out."""
    while True:
        inner = getattr(module, "_orig_mod", None)  # torch.compile's
        if inner is None and type(module).__name__ in _WRAPPERS:
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _unknown(transformer: nn.Module, search: Search, separate: bool) -> TransformerPlan:
    search.candidates(transformer)  # raises where there is none
    return TransformerPlan(transformer, [], False, separate, [None], None, search)


def _named(transformer: nn.Module, name: str, blocks: nn.ModuleList, pattern: ForwardPattern) -> NamedBlocks:
    """A list whose streams have the model table's names, if its blocks do: engines have versions of their own."""
    entry = find_entry(transformer)
    for item in (item for group in (entry.sections if entry else ()) for item in group):
        if item.name == name and set(item.streams[: len(pattern.In)]) <= _parameter_names(blocks[0]):
            return NamedBlocks(name, blocks, pattern, item.streams)
    return NamedBlocks(name, blocks, pattern)


def _sections_by_table(transformer: nn.Module, named: list[NamedBlocks]) -> list[list[NamedBlocks]]:
    """Neighbours share a decision where the model table has them in one group (and their patterns allow it)."""
    entry = find_entry(transformer)
    group_of = {item.name: i for i, group in enumerate(entry.sections if entry else ()) for item in group}
    key = {item.name: (group_of.get(item.name, item.name), _streams(item)) for item in named}
    return [list(items) for _, items in groupby(named, lambda item: key[item.name])]


def _streams(item: NamedBlocks) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(item.pattern.In), frozenset(item.pattern.Out)


def _as_list(value: Nested) -> list[Any]:
    if value is None:
        return []
    # A ModuleList is itself a sequence of blocks: one value here.
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _per_transformer(name: str, value: Nested, count: int) -> list[Nested]:
    """One entry per transformer. A single transformer may have its entry with or without a list around."""
    if count == 1:
        values = _as_list(value)
        return values if len(values) == 1 and isinstance(values[0], (list, tuple)) else [value]
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one entry per transformer ({count}), got {_describe(value)}")
    return list(value)


def _find_lists(
    where: str, transformer: nn.Module, blocks: list[Any], names: list[Any]
) -> list[tuple[str, nn.ModuleList]]:
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"blocks_name{where}[{i}] must be a text, got {name!r}")
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
    sized = isinstance(value, (str, list, tuple, dict, nn.ModuleList, nn.Sequential))
    return f"{type(value).__name__} of {len(value)}" if sized else type(value).__name__
