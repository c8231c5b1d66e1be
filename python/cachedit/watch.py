"""Noticing requests: a pipeline's own ``progress_bar`` says when its denoising loop starts, and how long it is."""

from __future__ import annotations

from types import MethodType
from typing import Any

from .controller import Controller

__all__ = ["PipelineWatch"]

_ATTRIBUTE = "_cachedit_watch"


class PipelineWatch:
    """Wraps one pipeline instance's ``progress_bar``, which nearly every diffusers pipeline calls with its true step
    count right before the loop (``set_timesteps`` misleads: image-to-image runs fewer steps than it sets).

    Args:
        pipe: The pipeline.
        controllers: Controllers of its transformers.
    """

    def __init__(self, pipe: Any, controllers: list[Controller]):
        self.pipe = pipe
        self.controllers = controllers

    @staticmethod
    def of(pipe: Any) -> PipelineWatch | None:
        """The watch on a pipeline, or None."""
        return getattr(pipe, "__dict__", {}).get(_ATTRIBUTE)

    def attach(self) -> None:
        """Start watching."""
        vars(self.pipe)[_ATTRIBUTE] = self
        self._previous = vars(self.pipe).get("progress_bar")
        if callable(getattr(self.pipe, "progress_bar", None)):
            vars(self.pipe)["progress_bar"] = self.progress_bar

    def release(self) -> None:
        """Stop watching; the pipeline gets its own ``progress_bar`` back."""
        attributes = vars(self.pipe)
        attributes.pop(_ATTRIBUTE, None)
        current = attributes.get("progress_bar")
        if isinstance(current, MethodType) and current.__self__ is self:
            attributes.pop("progress_bar")
            if self._previous is not None:
                attributes["progress_bar"] = self._previous

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Start a request on all transformers, then do what the pipeline's own method does."""
        steps = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else None
        # With several transformers each sees a part of the steps only.
        shared = len(self.controllers) > 1
        for controller in self.controllers:
            controller.begin_request(controller.config.num_inference_steps if shared else steps)
        original = self._previous or MethodType(type(self.pipe).progress_bar, self.pipe)
        return original(iterable, total) if iterable is not None else original(total=total)
