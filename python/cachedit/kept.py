"""Whether a transformer's loop keeps what single blocks return beyond the next one, as skip connections do."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .blocks import Link

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
        """Whether all sections have been watched to their end."""
        return len(self.seen) == len(self.controller.sections)

    def __enter__(self) -> KeptOutputs:
        self.handles = [
            block.register_forward_hook(partial(self._hear, link, number))
            for blocks, link in self.controller.lists
            for number, block in enumerate(blocks, link.offset)
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hear(self, link: Link, number: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden, _ = link.signature.pattern.unpack(block, output)
        earlier = self.returned.setdefault(link.index, [])
        earlier.append(weakref.ref(hidden))
        section = link.section
        if number < section.total - 1:
            return
        self.seen.add(link.index)
        # The loop still has the last block's input; the engine the body's.
        watched = range(section.total - 2 if len(self.controller.sections) > 1 else section.first)
        held = [earlier[-1](), earlier[section.first - 1]()]
        for other in watched:
            tensor = earlier[other]() if other != section.first - 1 else None
            self.found = self.found or (tensor is not None and all(tensor is not its for its in held))
