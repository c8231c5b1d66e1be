"""TeaCache's tap: a forward hook that hands a module's output to the running forward, as the signal to measure."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .blocks import current_run, run_sections
from .models.signals import find_signal
from .modifier import Settings
from .sea import SeaModel, find_sea, sea_filter
from .teacache import TeaCacheConfig, TeaCachePolicy

__all__ = ["Tap", "make_tap"]


class Tap:
    """What TeaCache measures on one transformer.

    Args:
        transformer: The transformer.
        config: Validated configuration.

    Raises:
        ValueError: If it is not known what to measure on this class, or which coefficients belong to it.
    """

    def __init__(self, transformer: nn.Module, config: TeaCacheConfig):
        self.sea: SeaModel | None = None
        if config.metric == "sea":
            self.sea, self.coefficients = find_sea(transformer, config)
            self.signal = self.sea.signal
        else:
            self.signal, self.coefficients = find_signal(transformer, config)
        self.module = transformer.get_submodule(self.signal.module)
        self.settings: Mapping[str, Any] = getattr(transformer, "config", {})
        self.parameters = inspect.signature(type(transformer).forward)

    def make_policy(self, config: TeaCacheConfig, total_steps: int | None) -> TeaCachePolicy:
        """Return the policy of one request, branch and section."""
        return TeaCachePolicy(config, total_steps, self.coefficients)

    def attach(self, controller: Any) -> None:
        """Listen, during forwards of ``controller``."""
        self.handle = self.module.register_forward_hook(partial(self._hear, controller), with_kwargs=True)

    def detach(self) -> None:
        """Stop listening."""
        self.handle.remove()

    def _hear(
        self, controller: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = current_run()
        if forward is not None and forward.controller is controller:
            signal = self.signal.read(args, kwargs, output)
            forward.signal = signal if self.sea is None else self._filter(self.sea, signal, forward)

    def _filter(self, sea: SeaModel, signal: torch.Tensor, forward: run_sections) -> torch.Tensor:
        arguments = self.parameters.bind_partial(None, *forward.args, **forward.kwargs).arguments
        # The grid may have to be read from the device: once per request, as long as the number of tokens stays.
        branch = forward.branch
        if branch.grid is None or math.prod(branch.grid) != signal.shape[1]:
            branch.grid = sea.grid(self.settings, arguments)
        return sea_filter(signal, branch.grid, sea.sigma(arguments), sea.exponent)


def make_tap(transformer: nn.Module, settings: Sequence[Settings]) -> Tap | None:
    """Return the one tap for all sections that TeaCache decides, or None if it decides none.

    Raises:
        ValueError: As :class:`Tap`, and if sections are to be measured differently.
    """
    configs = [config for config, _ in settings if isinstance(config, TeaCacheConfig)]
    if not configs:
        return None
    first = configs[0]
    if any((config.metric, config.coefficients) != (first.metric, first.coefficients) for config in configs):
        raise ValueError("metric and coefficients must be the same for all block lists of a transformer")
    return Tap(transformer, first)
