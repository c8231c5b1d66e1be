"""What a step's decision is measured by: how far the head's residual moved, or how far a tapped signal did."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch

import cachedit_kernels as kernels

from .store import add_up, allocate, read_back

__all__ = ["HeadResidual", "Measured", "Metric", "SignalChange", "relative"]


class Measured(NamedTuple):
    """What a step shows before it is decided."""

    before: torch.Tensor
    """hidden_states as the first block got it."""
    after: torch.Tensor
    """hidden_states after the head."""
    signal: torch.Tensor | None = None
    """Output of the tapped module in this forward, if one is tapped."""


class Metric(Protocol):
    """Measures a step, and keeps what later steps are measured against. Buffers are written in place."""

    known: bool
    """Whether there is anything to measure against."""

    @property
    def buffers(self) -> list[torch.Tensor]: ...

    @property
    def bytes_held(self) -> int: ...

    def measure(self, seen: Measured) -> float:
        """Return the relative L1 difference; infinity where there is nothing to compare with. Waits for the device."""
        ...

    def keep(self, seen: Measured, computed: bool) -> None:
        """Keep what the steps to come need."""
        ...

    def forget(self) -> None:
        """Drop what is kept; buffers stay allocated."""
        ...

    def release(self) -> None:
        """Drop the buffers as well."""
        ...


class HeadResidual:
    """DBCache's: how far the residual of the first blocks moved since the last computed step.

    ``sum |(after - before) - anchor| / sum |anchor|`` in fp32.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.ring: torch.Tensor | None = None
        self.anchor: torch.Tensor | None = None  # the same memory without the ring's dimension
        self.known = False

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [] if self.ring is None else [self.ring]

    @property
    def bytes_held(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def measure(self, seen: Measured) -> float:
        if not self.known:
            return math.inf
        return relative(self.sums(seen), self.group)[0]

    def sums(self, seen: Measured) -> torch.Tensor:
        """Return ``[[moved, size]]`` of a step, on the device."""
        assert self.anchor is not None
        return kernels.residual_l1([_before(seen)], [seen.after], [self.anchor])

    def keep(self, seen: Measured, computed: bool) -> None:
        if computed:
            self.write(seen)
            self.known = True

    def write(self, seen: Measured) -> None:
        """What :meth:`keep` does to the buffers at a computed step."""
        if self.ring is None:
            self.ring = allocate(1, seen.after)
            self.anchor = self.ring[0]
        kernels.residual_push([_before(seen)], [seen.after], [self.ring], 0)

    def forget(self) -> None:
        self.known = False

    def release(self) -> None:
        self.ring = self.anchor = None
        self.known = False


class SignalChange:
    """TeaCache's: how far a module's output moved since the step before, computed or not.

    ``sum |signal - previous| / sum |previous|`` in fp32.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.previous: torch.Tensor | None = None
        self.known = False

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [] if self.previous is None else [self.previous]

    @property
    def bytes_held(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def measure(self, seen: Measured) -> float:
        if not self.known or self.previous is None or seen.signal is None or not _alike(self.previous, seen.signal):
            return math.inf
        return relative(kernels.l1([self.previous], [seen.signal]), self.group)[0]

    def keep(self, seen: Measured, computed: bool) -> None:
        if seen.signal is None:
            self.known = False
            return
        if self.previous is None or not _alike(self.previous, seen.signal):
            self.previous = allocate(1, seen.signal)[0]
        self.previous.copy_(seen.signal)  # a copy: the tensor is the model's, which may write to it
        self.known = True

    def forget(self) -> None:
        self.known = False

    def release(self) -> None:
        self.previous = None
        self.known = False


def _before(seen: Measured) -> torch.Tensor:
    """In the dtype that the head returns, which under autocast need not be the one that it gets."""
    before, after = seen.before, seen.after
    return before if before.dtype == after.dtype else before.to(after.dtype)


def relative(sums: torch.Tensor, group: Any = None) -> list[float]:
    """Read rows of ``[moved, size]`` back and return their ratios; this waits for the device."""
    rows = read_back(add_up(sums, group))
    return [moved / size if size != 0.0 else 0.0 if moved == 0.0 else math.inf for moved, size in rows]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
