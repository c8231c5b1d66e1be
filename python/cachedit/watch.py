"""Noticing requests: a pipeline's ``progress_bar``, or its scheduler's timesteps, say when a denoising loop starts."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import nn

from .controller import Controller, controller_of
from .request import Loop, Request

__all__ = ["PipelineWatch"]

_ATTRIBUTE = "_cachedit_watch"


class PipelineWatch:
    """Tells the transformers of one pipeline instance when a request starts and how many steps it has.

    ``progress_bar``, which nearly every diffusers pipeline calls with its true step count right before the loop, is
    wrapped on this instance. Pipelines that do not call it, or run several loops under one bar, are noticed by their
    scheduler: ``set_timesteps`` makes a new ``timesteps`` tensor, and the next forward sees another object. Its length
    is the step count then, which may be too high (image-to-image sets more steps than it runs).

    Args:
        pipe: The pipeline.
        transformers: Its cached transformers. Of several each runs a part of the steps, which neither signal tells: the
            configured ``num_inference_steps`` is taken.
    """

    def __init__(self, pipe: Any, transformers: Sequence[nn.Module]):
        # Weak: who lets go of a pipeline or of a transformer gets the memory back.
        try:
            self._pipe = weakref.ref(pipe)
            vars(pipe)
        except TypeError:
            raise TypeError(f"pipe must be an object like a diffusers pipeline, got {type(pipe).__name__}") from None
        self._transformers = [weakref.ref(transformer) for transformer in transformers]
        self.timesteps = self._timesteps()  # of the loop before: there is none to notice yet

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineWatch | None:
        if id(self._pipe()) not in memo:
            return None  # only a transformer is copied: no pipeline runs the copy
        transformers = [each for each in (reference() for reference in self._transformers) if each is not None]
        other = memo[id(self)] = PipelineWatch(memo[id(self._pipe())], copy.deepcopy(transformers, memo))
        other.timesteps, other._previous = copy.deepcopy((self.timesteps, self._previous), memo)
        return other

    @staticmethod
    def of(pipe: Any) -> PipelineWatch | None:
        """The watch on a pipeline, or None."""
        return getattr(pipe, "__dict__", {}).get(_ATTRIBUTE)

    @property
    def controllers(self) -> list[Controller]:
        """What caches the transformers now; another pipeline that shares them may have enabled it anew."""
        controllers = (controller_of(reference()) for reference in self._transformers)
        return [controller for controller in controllers if controller is not None]

    def attach(self) -> None:
        """Start watching."""
        pipe = self._pipe()
        attributes = vars(pipe)
        attributes[_ATTRIBUTE] = self
        self._previous = attributes.get("progress_bar")
        if callable(getattr(pipe, "progress_bar", None)):
            attributes["progress_bar"] = self.progress_bar
        for controller in self.controllers:
            controller.watch = self

    def release(self, pipe: Any) -> None:
        """Stop watching; the pipeline, or a shallow copy of it, gets its own ``progress_bar`` back."""
        attributes = vars(pipe)
        attributes.pop(_ATTRIBUTE, None)
        current = attributes.get("progress_bar")
        if isinstance(current, MethodType) and current.__self__ is self:
            attributes.pop("progress_bar")
            if self._previous is not None:
                attributes["progress_bar"] = self._previous

    def progress_bar(self, iterable: Any = None, total: int | None = None, **kwargs: Any) -> Any:
        """Announce a request to all transformers, then do what the pipeline's own method does."""
        pipe: Any = self._pipe()
        if pipe is None:
            raise RuntimeError(
                "the pipeline that the cache was enabled on is gone, and this is a shallow copy of it: call "
                "enable_cache on the copy"
            )
        if iterable is None:
            steps = None if total is None else self._forwards(total)
        else:
            steps = len(iterable) if hasattr(iterable, "__len__") else total
        loop = Loop(self, self._timesteps(), None if len(self._transformers) > 1 else steps)
        for controller in self.controllers:
            controller.announce(loop)
        original = self._previous or MethodType(type(pipe).progress_bar, pipe)
        given = {"iterable": iterable, "total": total} | kwargs
        return original(**{name: value for name, value in given.items() if value is not None})

    def next_loop(self, request: Request) -> Loop | None:
        """The loop that a forward of this request begins; None if it goes on in the one before."""
        announced = request.announced
        known = announced or request.loop
        timesteps = self._timesteps()
        if timesteps is (self.timesteps if known is None else known.timesteps) or timesteps is None:
            return announced
        if timesteps is not self._timesteps():
            return announced  # made anew whenever it is asked for: it says nothing
        return Loop(self, timesteps, None if len(self._transformers) > 1 else len(timesteps))

    @property
    def scheduler_step(self) -> Any:
        """Where the scheduler is in its steps; None where it does not tell."""
        return getattr(getattr(self._pipe(), "scheduler", None), "step_index", None)

    def _timesteps(self) -> Any:
        return getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)

    def _forwards(self, total: int) -> int:
        """Forwards in so many steps: with a scheduler of order 2, two for each but the last."""
        order: int = getattr(getattr(self._pipe(), "scheduler", None), "order", 1)
        return order * (total - 1) + 1
