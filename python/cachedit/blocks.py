"""Interception of block lists: a transformer's loop over its blocks gets handed *sites* in place of blocks.

A ``ModuleList`` object is given a subclass as its class (:func:`intercept`), whose iteration hands out the sites of the
running forward, but only inside a forward of a transformer that the cache is enabled on. Everything else - indexing,
slicing, ``len``, child names, iteration outside of a forward - is the plain list.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .calibrator import CalibratorConfig
from .config import BasicCacheConfig
from .pattern import BlockSignature

if TYPE_CHECKING:
    from .tap import Tap

__all__ = [
    "SPLIT",
    "EagerSite",
    "Guard",
    "Link",
    "Run",
    "Section",
    "Site",
    "called_again",
    "check_sizes",
    "current_run",
    "intercept",
    "onload_group",
    "own_piece",
    "release",
    "run_sections",
]

SPLIT = "_cachedit_split"  # attribute of a module that splits its inputs among ranks
_thread = threading.local()  # .run: the innermost cached forward of this thread


class Section:
    """Block lists of one transformer that share one decision; blocks are numbered through all of them.

    Args:
        name: Shown in statistics.
        total: Number of blocks.
        config: Validated cache configuration.
        calibrator_config: Validated calibrator configuration, or None.
    """

    def __init__(
        self, name: str, total: int, config: BasicCacheConfig, calibrator_config: CalibratorConfig | None = None
    ):
        self.name = name
        self.total = total
        self.configure(config, calibrator_config)
        # Whether blocks write into their inputs; None until the first computed step has shown it.
        self.in_place: bool | None = None
        self.tap: Tap | None = None  # of TeaCache
        self.group: Any = None  # ranks that hold the other pieces of the sequence

    def configure(self, config: BasicCacheConfig, calibrator_config: CalibratorConfig | None) -> None:
        """Take on another configuration. Where it wants more blocks computed than there are, all are."""
        self.config, self.calibrator_config = config, calibrator_config
        self.first = config.Fn_compute_blocks  # block of the body
        self.last = self.total - config.Bn_compute_blocks - 1

    @property
    def body(self) -> int:
        """Number of blocks that a reused step skips."""
        return max(self.last - self.first + 1, 0)


def check_sizes(sections: Sequence[Section], configs: Sequence[BasicCacheConfig]) -> None:
    """A configuration may be meant for longer lists than some that it is given for, but not than all of them.

    Raises:
        ValueError: If one asks for more blocks than there are in any of its sections.
    """
    for section, config in zip(sections, configs, strict=True):
        computed = config.Fn_compute_blocks + config.Bn_compute_blocks
        longest = max(other.total for other, its in zip(sections, configs, strict=True) if its == config)
        if computed > longest:
            raise ValueError(
                f"Fn_compute_blocks + Bn_compute_blocks = {computed} ({config.Fn_compute_blocks} + "
                f"{config.Bn_compute_blocks}) is more than the {section.total} blocks of {section.name}"
            )


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


class Run(Protocol):
    """One section during one forward."""

    @property
    def bypassed(self) -> bool:
        """Whether the cache was left out because gradients are wanted."""
        ...

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
        """Hand out what the loop over one list gets to call."""
        ...

    def close(self) -> None:
        """The forward has ended without an error."""
        ...


class Guard:
    """Keeps inputs of blocks safe from being written to; finds out at the first computed step whether they are.

    Args:
        section: Remembers what was found.
    """

    __slots__ = ("originals", "section")

    def __init__(self, section: Section):
        self.section = section
        self.originals: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that still holds these values when the blocks have run."""
        if self.section.in_place is False:
            return tensor
        copy = tensor.clone()
        if self.section.in_place is None:
            self.originals.append((tensor, copy))
        return copy

    def compare(self) -> bool:
        """The blocks have run: whether any of them wrote to what was guarded since the last comparison."""
        wrote = not all(torch.equal(tensor, copy) for tensor, copy in self.originals)
        self.originals = []
        return wrote


class Site:
    """Stands in for a block while it is called in a loop; attributes are the block's."""

    __slots__ = ("block", "link", "run")

    def __init__(self, block: nn.Module, run: Any, link: Link):
        self.block = block
        self.run = run
        self.link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's hidden_states in a call."""
        signature = self.link.signature
        return own_piece(self.block, signature.hidden_name, signature.hidden(args, kwargs))

    def encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's encoder_hidden_states in a call, or None where it takes none."""
        signature = self.link.signature
        return own_piece(self.block, signature.encoder_name, signature.encoder(args, kwargs))


class EagerSite(Site):
    """A site that is taken for its block by loops that ask ``isinstance(block, ...)``; dynamo does not trace these."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.block)


def own_piece(block: nn.Module, name: str, stream: Any) -> Any:
    """What a block makes of a stream that it is called with: under sequence parallelism, the first one may split it."""
    split = vars(block).get(SPLIT)
    return stream if split is None or stream is None else split.stream(name, stream)


def called_again(section: Section) -> ValueError:
    """The error where a loop calls a block for the second time in one forward: what is stored is of the first."""
    return ValueError(f"blocks: {section.name} is run through twice in one forward, and cannot be cached")


def onload_group(block: nn.Module) -> None:
    """A block is about to run and the one before it was skipped: have diffusers' group offloading load its weights.

    The weights of a group are loaded by the hook on its first block, which does not run on a skipped one.
    """
    registry = vars(block).get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook("group_offloading")
    if hook is not None and hook.group.onload_leader is not block:
        hook.group.onload_()


class _InterceptedList(nn.ModuleList):
    """Mixed into the class of one list object; ``_cachedit_links`` maps the controllers to the list's place."""

    def __iter__(self) -> Iterator[Any]:
        if torch.compiler.is_compiling():
            return self._traced_sites()
        forward = current_run()
        link = None if forward is None else vars(self)["_cachedit_links"].get(forward.controller)
        if forward is None or link is None:
            return super().__iter__()
        run: Run = forward.sections[link.index]
        return run.sites(link, list(self._modules.values()))

    def _traced_sites(self) -> Iterator[Any]:
        for passes, link in vars(self)["_cachedit_passes"]:
            if passes.run is not None:
                return passes.run.sites(link, list(self._modules.values()))  # type: ignore[no-any-return]
        return iter(list(self._modules.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> _InterceptedList:
        other = memo[id(self)] = type(self).__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a transformer that the cache is enabled on cannot be pickled: call cachedit.disable_cache first "
            "(state_dict and save_pretrained work either way)"
        )

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # a slice is a plain list of the same blocks
            return vars(type(self))["_cachedit_class"](list(self._modules.values())[index])
        return super().__getitem__(index)


@functools.cache
def _intercepted_class(original: type) -> type:
    """One class per class of lists: compiled code is bound to it, and outlives a cache that is enabled anew."""
    return type(original.__name__, (_InterceptedList, original), {"_cachedit_class": original})


def intercept(blocks: nn.ModuleList, controller: Any, link: Link, passes: Any = None) -> None:
    """Hand out sites from this list object during forwards of ``controller``; other lists of its class stay as are.

    With ``passes``, also while these are traced.
    """
    if not isinstance(blocks, _InterceptedList):
        blocks.__class__ = _intercepted_class(type(blocks))  # type: ignore[arg-type]
        vars(blocks)["_cachedit_links"] = {}
        vars(blocks)["_cachedit_passes"] = []
    vars(blocks)["_cachedit_links"][controller] = link
    if passes is not None:
        vars(blocks)["_cachedit_passes"].append((passes, link))


def release(blocks: nn.ModuleList, controller: Any) -> None:
    """Undo :func:`intercept` for ``controller``; with the last one the list gets its own class back."""
    if isinstance(blocks, _InterceptedList):
        links = vars(blocks)["_cachedit_links"]
        links.pop(controller, None)
        passes = vars(blocks)["_cachedit_passes"]
        passes[:] = [entry for entry in passes if entry[0].controller is not controller]
        if not links:
            del vars(blocks)["_cachedit_links"], vars(blocks)["_cachedit_passes"]
            blocks.__class__ = vars(type(blocks))["_cachedit_class"]


def current_run() -> Any:
    """The cached forward that this thread is in, or None."""
    return getattr(_thread, "run", None)


class run_sections:
    """Context manager: inside, lists hand out the sites of this forward.

    Args:
        controller: The transformer's controller.
        sections: One run per section.
        branch: The guidance branch that this forward belongs to.
        args: Positional arguments of the forward.
        kwargs: Its other arguments.
    """

    __slots__ = ("args", "branch", "controller", "kwargs", "outer", "sections", "signal")

    def __init__(
        self, controller: Any, sections: Sequence[Run], branch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        self.controller = controller
        self.sections = sections
        self.branch = branch
        self.args = args
        self.kwargs = kwargs
        self.signal: torch.Tensor | None = None  # of TeaCache, once the tapped module has run

    def __enter__(self) -> run_sections:
        self.outer = current_run()
        _thread.run = self
        return self

    def __exit__(self, *exc: object) -> None:
        _thread.run = self.outer
