"""One cached transformer: its sections, its requests, and how the cache is put on and off."""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn

from .adapter import TransformerPlan
from .blocks import Link, Section, intercept, release, run_sections
from .config import BasicCacheConfig
from .modifier import Settings
from .pattern import BlockSignature
from .request import DEFAULT, Branch, Request, Requests
from .tap import Tap, make_tap
from .teacache import TeaCacheConfig

__all__ = ["Controller", "controller_of"]

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_cachedit_controller"
_thread = threading.local()  # .names: branch names from cache_context, .keys: of requests; both by controller


class CachedForward:
    """Stands in for a transformer's ``forward``; carries its signature, which pipelines inspect."""

    def __init__(self, controller: Controller, original: Any):
        functools.update_wrapper(self, original)
        self.controller = controller
        self.original = original
        self.uncompiled = _uncompiled_forward()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # What changes from step to step must not be traced; blocks can be compiled by themselves.
            return self.uncompiled(self.controller, self.original, args, kwargs)
        return self.controller.forward(self.original, args, kwargs)


@functools.cache
def _uncompiled_forward() -> Any:
    def forward(controller: Controller, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return controller.forward(original, args, kwargs)

    return torch.compiler.disable(forward)  # imports dynamo: not before a cache is enabled


class Controller:
    """Puts the cache on one transformer instance.

    Args:
        plan: The transformer and its block lists.
        settings: Configurations per section of the plan, validated and copied by the caller. What concerns the
            transformer as a whole (guidance branches, step count) is taken from the first.

    Raises:
        ValueError: If the configuration or a pattern does not fit the blocks. Nothing is changed then.
    """

    def __init__(self, plan: TransformerPlan, settings: Sequence[Settings]):
        self.transformer = plan.transformer
        self.has_separate_cfg = plan.has_separate_cfg
        self.sections: list[Section] = []
        self.lists: list[tuple[nn.ModuleList, Link]] = []
        for index, (group, chosen) in enumerate(zip(plan.sections, settings, strict=True)):
            name = "+".join(item.name for item in group)
            section = Section(name, sum(len(item.blocks) for item in group), *chosen)
            offset = 0
            for item in group:
                signature = BlockSignature(item.blocks[0], item.pattern, check=plan.check_forward_pattern)
                self.lists.append((item.blocks, Link(index, section, offset, signature)))
                offset += len(item.blocks)
            self.sections.append(section)
        self.attached = False
        self.tap: Tap | None = None
        self._set_tap(make_tap(self.transformer, settings))
        self.requests = Requests()
        self.warned_about_grad = self.warned_about_idling = False

    @property
    def config(self) -> BasicCacheConfig:
        """Configuration of the first section."""
        return self.sections[0].config

    @property
    def settings(self) -> list[Settings]:
        """Configurations per section."""
        return [Settings(section.config, section.calibrator_config) for section in self.sections]

    # Requests and branches

    @property
    def request(self) -> Request:
        """The request that this thread works on."""
        key = getattr(_thread, "keys", {}).get(id(self), DEFAULT)
        steps = self.config.num_inference_steps
        return self.requests.get(key, steps, steps is not None)

    @property
    def branches(self) -> dict[str, Branch]:
        """Branches of this thread's request, or of the one that ran last."""
        branches = self.request.branches
        latest = self.requests.latest
        return branches if branches or latest is None else latest.branches

    def begin_request(self, total_steps: int | None = None, ends: bool = False) -> None:
        """Start a request: nothing of the one before is reused; buffers stay.

        Args:
            total_steps: Denoising steps of the request, where known.
            ends: Whether a forward after the last of these steps begins the next request.

        Raises:
            ValueError: If the configuration's mask has another length.
        """
        for section in self.sections:
            section.config.resolve_mask(total_steps)
        self.request.begin(total_steps, ends)

    def reconfigure(self, settings: Sequence[Settings]) -> None:
        """Take on other configurations, one per section, and start afresh."""
        steps = settings[0].config.num_inference_steps
        for section, (config, _) in zip(self.sections, settings, strict=True):
            section.check(config)
            config.resolve_mask(steps)
        tap = make_tap(self.transformer, settings)
        for section, chosen in zip(self.sections, settings, strict=True):
            section.configure(*chosen)
        self._set_tap(tap)
        self.requests.clear()
        self.warned_about_idling = False

    def _set_tap(self, tap: Tap | None) -> None:
        if self.tap is not None and self.attached:
            self.tap.detach()
        self.tap = tap
        for section in self.sections:
            section.tap = tap if isinstance(section.config, TeaCacheConfig) else None
        if tap is not None and self.attached:
            tap.attach(self)

    @contextmanager
    def use_request(self, key: Hashable, total_steps: int | None) -> Iterator[None]:
        """Run the forwards inside, of this thread, on the request ``key``."""
        keys = _thread.__dict__.setdefault("keys", {})
        with _entry(keys, id(self), key):
            steps = self.config.num_inference_steps if total_steps is None else total_steps
            self.requests.get(key, steps, steps is not None)
            yield

    def branch_name(self, request: Request) -> str:
        """The guidance branch that the next forward belongs to: as the pipeline says, else by the order of calls."""
        name: str | None = getattr(_thread, "names", {}).get(id(self))
        if name is not None:
            return name
        separate = self.config.enable_separate_cfg
        if not (self.has_separate_cfg if separate is None else separate):
            return "default"
        return "uncond" if (request.calls % 2 == 0) == self.config.cfg_compute_first else "cond"

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Run the forwards inside on the branch ``name``; diffusers pipelines call it around each guidance branch.

        ``where`` tells diffusers' own hooks where the denoising loop is (``step_index``, ``sigma``, ...).
        """
        names = _thread.__dict__.setdefault("names", {})
        original = getattr(type(self.transformer), "cache_context", None)
        inner = nullcontext() if original is None else original(self.transformer, name, **where)
        with _entry(names, id(self), name), inner:
            yield

    # One forward

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the transformer's own forward with its block lists handing out sites."""
        if not self.attached or self._wants_gradients():
            return original(*args, **kwargs)
        request = self.request
        outer = request.enter()
        try:
            branch = request.branch(self.branch_name(request), self.sections)
            step = branch.step
            runs = branch.runs()
            try:
                with run_sections(self, runs, branch, args, kwargs):
                    output = original(*args, **kwargs)
                for run in runs:
                    run.close()
                    if run.bypassed:
                        self._warn_about_gradients("the blocks' inputs")
            except BaseException:
                branch.rewind(step)
                raise
            request.calls += 1
        finally:
            request.leave(outer)
        self.requests.limit_bytes(request)
        if branch.step == request.total_steps and not self.warned_about_idling:
            self._warn_if_idle(branch)
        return output

    def _wants_gradients(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        trained = next((name for name, p in self.transformer.named_parameters() if p.requires_grad), None)
        if trained is None:
            return False
        self._warn_about_gradients(f"parameters such as {trained}")
        return True

    def _warn_about_gradients(self, of: str) -> None:
        if not self.warned_about_grad:
            self.warned_about_grad = True
            name = type(self.transformer).__name__
            logger.warning(
                "the cache is bypassed on %s: gradients are enabled, and wanted of %s; call it under torch.no_grad() "
                "or torch.inference_mode()",
                name,
                of,
            )

    def _warn_if_idle(self, branch: Branch) -> None:
        """A cache that does nothing should not do it silently: say so once, after a whole request without reuse."""
        for section, state in zip(self.sections, branch.states, strict=True):
            records = state.policy.records
            if section.body == 0 or state.policy.never_reuses or any(record.reused for record in records):
                continue
            self.warned_about_idling = True
            diffs = [record.diff for record in records if record.diff is not None]
            reasons = Counter(record.reason for record in records)
            logger.warning(
                "the cache never triggered on %s.%s in a request of %d steps: %s; the smallest diff was %s, "
                "the threshold is %s",
                type(self.transformer).__name__,
                section.name,
                len(records),
                ", ".join(f"{reason or 'not cached'} {count}x" for reason, count in reasons.items()),
                f"{min(diffs):.4f}" if diffs else "never measured",
                state.policy.threshold,
            )

    # On and off

    def attach(self) -> None:
        """Put the cache on the transformer."""
        previous = controller_of(self.transformer)
        if previous is not None:
            previous.detach()
        module = self.transformer
        holder, name = _find_own_forward(module)
        self._had_forward = name in vars(holder)
        _put(holder, name, CachedForward(self, getattr(holder, name)))
        for blocks, link in self.lists:
            intercept(blocks, self, link)
        if self.tap is not None:
            self.tap.attach(self)
        if hasattr(module, "cache_context"):
            _put(module, "cache_context", self.cache_context)
        _put(module, _ATTRIBUTE, self)
        self.attached = True

    def detach(self) -> None:
        """Take the cache off; what was there before is put back."""
        if self.tap is not None and self.attached:
            self.tap.detach()
        self.attached = False
        module = self.transformer
        for holder, name in _forward_slots(module):
            value = vars(holder).get(name)
            if isinstance(value, CachedForward) and value.controller is self:
                if holder is module and name == "forward" and not self._had_forward:
                    del vars(module)[name]
                else:
                    _put(holder, name, value.original)
        for blocks, _ in self.lists:
            release(blocks, self)
        if getattr(vars(module).get("cache_context"), "__self__", None) is self:
            vars(module).pop("cache_context")
        vars(module).pop(_ATTRIBUTE, None)
        self.requests.clear()


def controller_of(module: Any) -> Controller | None:
    """Return the controller of a transformer that the cache is enabled on, else None."""
    module = getattr(module, "_orig_mod", module)
    return getattr(module, "__dict__", {}).get(_ATTRIBUTE)


@contextmanager
def _entry(table: dict[int, Any], key: int, value: Any) -> Iterator[None]:
    """Inside, ``table[key]`` is ``value``."""
    missing = object()
    outer = table.get(key, missing)
    table[key] = value
    try:
        yield
    finally:
        if outer is missing:
            del table[key]
        else:
            table[key] = outer


def _put(holder: Any, name: str, value: Any) -> None:
    vars(holder)[name] = value


def _forward_slots(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a module's own forward may be kept: accelerate and diffusers hooks replace ``module.forward``."""
    if "_old_forward" in vars(module):  # accelerate
        yield module, "_old_forward"
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "original_forward"
        yield reference, "forward"
    yield module, "forward"


def _find_own_forward(module: nn.Module) -> tuple[Any, str]:
    """The slot that holds the module's own forward: inside of all hooks, so that they keep working in any order."""
    for holder, name in _forward_slots(module):
        value = getattr(holder, name)
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward:
            return holder, name
    return module, "forward"
