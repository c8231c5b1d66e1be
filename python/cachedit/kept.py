"""Whether a transformer's loop keeps what single blocks return beyond the next one, as skip connections do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .blocks import Link, Run

if TYPE_CHECKING:
    from .controller import Controller

__all__ = ["KeptOutputs"]


class KeptOutputs:
    """Context manager: watches the blocks during one forward whose steps are computed.

    A forward that runs in passes hands over, from one pass to the next, the streams at which a section's body begins
    and those at which a section ends. Nobody may look for others: outputs of blocks before them have to be forgotten
    by the time that the section's last block has run.

    Args:
        controller: The transformer's.
    """

    def __init__(self, controller: Controller):
        self.controller = controller
        self.returned: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self.seen: set[int] = set()  # sections whose last block has run
        self.found = False

    @property
    def complete(self) -> bool:
        """Whether all sections have been watched to their end, of those whose loop goes through the engine at all."""
        return self.seen == set(self.returned)

    def __enter__(self) -> KeptOutputs:
        self.controller.watched_by = self
        return self

    def __exit__(self, *exc: object) -> None:
        self.controller.watched_by = None

    def watch(self, runs: list[Run]) -> list[Run]:
        """Stand between the loops and what they are handed. Hooks on the blocks would be compiled with them."""
        return [_HeardRun(run, self.hear) for run in runs]

    def hear(self, run: Run, link: Link, number: int, block: Any, output: Any) -> None:
        """A block, or what stands in for it, has returned this."""
        hidden, _ = link.signature.pattern.unpack(block, output)
        earlier = self.returned.setdefault(link.index, [])
        earlier.append(weakref.ref(hidden))
        section = link.section
        if number < section.total - 1:
            return
        if getattr(run, "reuse", False):
            return  # its body did not run
        self.seen.add(link.index)
        # The loop still has the last block's input; the engine the body's.
        watched = range(section.total - 2 if len(self.controller.sections) > 1 else section.first)
        held = [earlier[-1](), earlier[section.first - 1]()]
        for other in watched:
            tensor = earlier[other]() if other != section.first - 1 else None
            self.found = self.found or (tensor is not None and all(tensor is not its for its in held))


class _HeardRun:
    def __init__(self, run: Run, hear: Callable[[Run, Link, int, Any, Any], None]):
        self.run, self.hear = run, hear

    @property
    def bypassed(self) -> bool:
        return self.run.bypassed

    def sites(self, link: Link, blocks: list[nn.Module]) -> Iterator[Any]:
        for number, site in enumerate(self.run.sites(link, blocks), link.offset):
            yield _Heard(site, partial(self.hear, self.run, link, number))

    def close(self) -> None:
        self.run.close()


class _Heard:
    __slots__ = ("hear", "site")

    def __init__(self, site: Any, hear: Callable[[Any, Any], None]):
        self.site, self.hear = site, hear

    def __getattr__(self, name: str) -> Any:
        return getattr(self.site, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.site(*args, **kwargs)
        self.hear(self.site, output)
        return output
