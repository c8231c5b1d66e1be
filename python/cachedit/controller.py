"""One cached transformer: its sections, its requests, and how the cache is put on and off."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .adapter import TransformerPlan, unwrapped
from .blocks import Link, Section, check_sizes, intercept, release, run_sections
from .config import BasicCacheConfig
from .forward import CachedForward, find_own_forward, forward_slots
from .integrations.internals import CachedContextManager
from .modifier import Settings
from .parallel.state import sequence_group
from .patch_functor import is_patched
from .pattern import BlockSignature
from .request import Branch, Loop, Request, Requests, check_key
from .scope import Scope, branch_names, scopes
from .tap import Tap, make_tap
from .teacache import TeaCacheConfig

if TYPE_CHECKING:
    from .cuda_graphs import ForwardGraphs
    from .kept import KeptOutputs
    from .watch import PipelineWatch

__all__ = ["Controller", "controller_of"]

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_cachedit_controller"


class Step(NamedTuple):
    """A forward that has begun."""

    request: Request
    outer: int | None
    """For :meth:`Requests.leave`."""
    branch: Branch


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
        self.patch_functor = plan.patch_functor
        self.patched = False
        self.has_separate_cfg = plan.has_separate_cfg
        self.denoises = plan.denoises
        self.sections: list[Section] = []
        self.lists: list[tuple[nn.ModuleList, Link]] = []
        self.group: Any = sequence_group(self.transformer)
        with self.patch_functor.applied(self.transformer) if self.patch_functor else nullcontext():
            self._link(plan, settings)  # signatures are those of patched blocks
        self.attached = False
        self.tap: Tap | None = None
        self._set_tap(make_tap(self.transformer, settings))
        self.requests = Requests()
        self.graphs: ForwardGraphs | None = None
        self.watched_by: KeptOutputs | None = None  # during one forward
        self.watch: PipelineWatch | None = None  # on the pipeline that the cache was enabled through
        self.warned_about_grad = self.warned_about_idling = self.warned_about_mask = False

    def _link(self, plan: TransformerPlan, settings: Sequence[Settings]) -> None:
        for index, (group, chosen) in enumerate(zip(plan.sections, settings, strict=True)):
            name = "+".join(item.name for item in group)
            section = Section(name, sum(len(item.blocks) for item in group), *chosen)
            section.group = self.group
            offset = 0
            for item in group:
                signature = BlockSignature(item.blocks[0], item.pattern, plan.check_forward_pattern, item.streams)
                self.lists.append((item.blocks, Link(index, section, offset, signature)))
                offset += len(item.blocks)
            self.sections.append(section)
        check_sizes(self.sections, [section.config for section in self.sections])

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
    def scope(self) -> Scope:
        """The request that this thread (or asyncio task) works on, with its steps where they were given."""
        return scopes.get(self) or Scope()

    @property
    def branches(self) -> dict[str, Branch]:
        """Branches that have run in this thread's request; outside of ``cachedit.request``, in the last one."""
        scope = scopes.get(self)
        request = self.requests.latest if scope is None else self.requests.find(scope.key)
        branches = {} if request is None else dict(request.branches)
        return {name: branch for name, branch in branches.items() if branch.has_run}

    def begin_request(self) -> None:
        """Start a request: nothing of the one before is reused; buffers stay."""
        self.requests.begin(self.scope.key, self._steps(self.scope))

    def announce(self, loop: Loop) -> None:
        """A pipeline is about to run a denoising loop: its first forward begins a request."""
        self.requests.announce(self.scope.key, loop, self._steps(self.scope))

    def reconfigure(self, settings: Sequence[Settings]) -> None:
        """Take on other configurations, one per section, and start afresh."""
        steps = settings[0].config.num_inference_steps
        check_sizes(self.sections, [config for config, _ in settings])
        for config, _ in settings:
            config.resolve_mask(steps)
        tap = make_tap(self.transformer, settings)
        for section, chosen in zip(self.sections, settings, strict=True):
            section.configure(*chosen)
        self._set_tap(tap)
        self.requests.clear()
        if self.graphs is not None:
            self.graphs.clear()
        self.warned_about_idling = self.warned_about_mask = False

    def join(self, group: Any) -> None:
        """Decide alike with the ranks that hold the other pieces of the sequences; None is this rank alone."""
        self.group = group
        for section in self.sections:
            section.group = group
        self.requests.clear()

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
        """Run the forwards inside, of this thread (or asyncio task), on the request ``key``."""
        check_key(key)
        if total_steps is not None and (type(total_steps) is not int or total_steps < 1):
            raise ValueError(f"num_inference_steps must be an integer of at least 1, got {total_steps!r}")
        scope = Scope(key, total_steps)
        self._check_masks(self._steps(scope))
        with scopes.entry(self, scope):
            yield

    def _steps(self, scope: Scope) -> int | None:
        return self.config.num_inference_steps if scope.total_steps is None else scope.total_steps

    def _check_masks(self, total_steps: int | None) -> None:
        for section in self.sections:
            section.config.resolve_mask(total_steps)

    def _masks_fit(self, total_steps: int | None) -> bool:
        try:
            self._check_masks(total_steps)
        except ValueError:
            return False
        return True

    def _listen(self, request: Request, scope: Scope) -> None:
        """Hear from the pipeline, before a forward, whether a request begins and where its scheduler is."""
        told = request.announced or request.loop
        watch = self.watch if told is None else told.watch
        loop = None if watch is None else watch.next_loop(request)
        # Who gives each request its steps may share the scheduler between them.
        given = scope.total_steps is not None
        if loop is not None and (loop is request.announced or not given):
            self._begin(request, loop, self._steps(scope))
        request.heed(None if watch is None or given else watch.scheduler_step)

    def _begin(self, request: Request, loop: Loop, steps: int | None) -> None:
        if loop is request.announced:
            steps = steps if loop.total_steps is None else loop.total_steps
            self._check_masks(steps)
        elif steps is None and self._masks_fit(loop.total_steps):  # a guess, and nothing to fail on
            steps = loop.total_steps
        request.begin(steps)
        request.announced, request.loop = None, loop

    def branch_name(self, turn: int) -> str:
        """The guidance branch of a forward, after so many in its step: as the pipeline says, else by their order."""
        name = branch_names.get(self)
        if name is not None:
            return name
        separate = self.config.enable_separate_cfg
        if not (self.has_separate_cfg if separate is None else separate):
            return "default"
        return "uncond" if (turn % 2 == 0) == self.config.cfg_compute_first else "cond"

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Run the forwards inside on the branch ``name``; diffusers pipelines call it around each guidance branch.

        ``where`` tells diffusers' own hooks where the denoising loop is (``step_index``, ``sigma``, ...).
        """
        original = getattr(type(self.transformer), "cache_context", None)
        inner = nullcontext() if original is None else original(self.transformer, name, **where)
        with branch_names.entry(self, name), inner:
            yield

    # One forward

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the transformer's own forward with its block lists handing out sites."""
        if self.is_bypassed(args, kwargs):
            return original(*args, **kwargs)
        step = self.begin_step()
        try:
            if self.graphs is None:
                output = self._run(original, step.branch, args, kwargs)
            else:
                eagerly = functools.partial(self._run, original, step.branch, args, kwargs)
                output = self.graphs.forward(original, step.branch, args, kwargs, eagerly)
        except BaseException:
            self.abandon_step(step)
            raise
        self.end_step(step)
        return output

    def is_bypassed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the transformer runs this call as if there were no cache."""
        denoises = self.denoises is None or self.denoises(*args, **kwargs)
        return not (self.attached and denoises) or self._wants_gradients()

    def begin_step(self) -> Step:
        """A forward begins: find its request and branch. :meth:`end_step` or :meth:`abandon_step` has to follow."""
        scope = self.scope
        steps = self._steps(scope)
        request, outer = self.requests.enter(scope.key, steps)
        try:
            self._listen(request, scope)
            branch = request.branch(self.branch_name(request.turn), self.sections, steps)
            if request.calls == 0:
                self._warn_if_masks_are_unresolved(request)
        except BaseException:
            request.begin(request.total_steps)
            self.requests.leave(request, outer)
            raise
        return Step(request, outer, branch)

    def end_step(self, step: Step) -> None:
        """The forward has ended."""
        step.request.calls += 1
        self.requests.leave(step.request, step.outer)
        if step.branch.step == step.request.total_steps and not self.warned_about_idling:
            self._warn_if_idle(step.branch)

    def abandon_step(self, step: Step) -> None:
        """The forward has raised. Nobody goes on after that: the next one begins a request."""
        step.request.begin(step.request.total_steps)
        self.requests.leave(step.request, step.outer)

    def _run(self, original: Any, branch: Branch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runs = branch.runs() if self.watched_by is None else self.watched_by.watch(branch.runs())
        with run_sections(self, runs, branch, args, kwargs):
            output = original(*args, **kwargs)
        for run in runs:
            run.close()
            if run.bypassed:
                self._warn_about_gradients("the blocks' inputs")
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

    def _warn_if_masks_are_unresolved(self, request: Request) -> None:
        for section in self.sections:
            mask = section.config.steps_computation_mask
            if isinstance(mask, str) and request.total_steps is None and not self.warned_about_mask:
                self.warned_about_mask = True
                logger.warning(
                    "steps_computation_mask=%r has no effect on %s: how many steps a request has is not known; set "
                    "num_inference_steps",
                    mask,
                    type(self.transformer).__name__,
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
        if self.patch_functor is not None and not is_patched(module):  # else the user has patched it, and keeps it so
            self.patch_functor.apply(module)
            self.patched = True
        holder, name = find_own_forward(module)
        self._had_forward = name in vars(holder)
        forward = CachedForward(self, getattr(holder, name))
        self.passes = forward.passes
        _put(holder, name, forward)
        for blocks, link in self.lists:
            intercept(blocks, self, link, self.passes)
        if self.tap is not None:
            self.tap.attach(self)
        if hasattr(module, "cache_context"):
            _put(module, "cache_context", self.cache_context)
        if getattr(module, "_is_parallelized", False):  # by an engine, which tells its ranks through this object
            _put(module, "_context_manager", CachedContextManager(self.join))
        _put(module, _ATTRIBUTE, self)
        self.attached = True

    def detach(self) -> None:
        """Take the cache off; what was there before is put back."""
        if self.tap is not None and self.attached:
            self.tap.detach()
        self.attached = False
        module = self.transformer
        for holder, name in forward_slots(module):
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
        vars(module).pop("_context_manager", None)
        vars(module).pop(_ATTRIBUTE, None)
        if self.patch_functor is not None and self.patched:
            self.patch_functor.undo(module)
            self.patched = False
        self.watch = None
        self.requests.clear()


def controller_of(module: Any) -> Controller | None:
    """Return the controller of a transformer that the cache is enabled on, else None."""
    module = unwrapped(module)
    return getattr(module, "__dict__", {}).get(_ATTRIBUTE)


def _put(holder: Any, name: str, value: Any) -> None:
    vars(holder)[name] = value
