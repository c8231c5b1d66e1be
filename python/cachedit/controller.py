"""One cached transformer: its sections, the branches of the running request, and how the cache is put on and off."""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from .adapter import TransformerPlan
from .blocks import Link, Section, SectionRun, intercept, release, run_sections
from .config import BasicCacheConfig, CalibratorConfig
from .context import SectionState
from .pattern import BlockSignature

__all__ = ["Branch", "Controller", "controller_of"]

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_cachedit_controller"
_thread = threading.local()  # .names: branch names from cache_context, by controller


class Branch:
    """One guidance branch of the running request: one state per section.

    Args:
        name: As the pipeline calls it (``cache_context(name)``), or "cond", "uncond" or "default".
        sections: The transformer's sections.
        config: Cache configuration.
        calibrator_config: Calibrator configuration, or None.
        total_steps: Steps of the request, if known.
    """

    def __init__(
        self,
        name: str,
        sections: list[Section],
        config: BasicCacheConfig,
        calibrator_config: CalibratorConfig | None,
        total_steps: int | None,
    ):
        self.name = name
        self.states = [SectionState(config, calibrator_config) for _ in sections]
        self.begin(total_steps)

    @property
    def step(self) -> int:
        """Steps of this request that are done."""
        return self.states[0].policy.step

    def begin(self, total_steps: int | None) -> None:
        """Start a request."""
        for state in self.states:
            state.begin(total_steps)

    def rewind(self, step: int) -> None:
        """Go back to the start of a step that failed, with nothing stored."""
        for state in self.states:
            policy = state.policy
            policy.step = step
            policy.records = [record for record in policy.records if record.step < step]
            state.forget()


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
        config: Cache configuration; validated and copied by the caller.
        calibrator_config: Calibrator configuration, or None.

    Raises:
        ValueError: If the configuration or a pattern does not fit the blocks. Nothing is changed then.
    """

    def __init__(self, plan: TransformerPlan, config: BasicCacheConfig, calibrator_config: CalibratorConfig | None):
        self.transformer = plan.transformer
        self.config = config
        self.calibrator_config = calibrator_config
        self.has_separate_cfg = plan.has_separate_cfg
        self.sections: list[Section] = []
        self.lists: list[tuple[nn.ModuleList, Link]] = []
        for index, group in enumerate(plan.sections):
            name = "+".join(item.name for item in group)
            total = sum(len(item.blocks) for item in group)
            section = Section(name, total, config.Fn_compute_blocks, config.Bn_compute_blocks)
            _check_fits(section, config)
            offset = 0
            for item in group:
                signature = BlockSignature(item.blocks[0], item.pattern, check=plan.check_forward_pattern)
                self.lists.append((item.blocks, Link(index, section, offset, signature)))
                offset += len(item.blocks)
            self.sections.append(section)
        self.branches: dict[str, Branch] = {}
        self.total_steps = config.num_inference_steps
        self.calls = 0  # forwards in this request, over all branches
        self.warned_about_grad = self.warned_about_idling = False
        self.attached = False

    # Requests and branches

    def begin_request(self, total_steps: int | None = None) -> None:
        """Start a request: nothing of the one before is reused; buffers stay.

        Args:
            total_steps: Denoising steps of the request, where known.

        Raises:
            ValueError: If the configuration's mask has another length.
        """
        self.config.resolve_mask(total_steps)
        self.total_steps = total_steps
        self.calls = 0
        for branch in self.branches.values():
            branch.begin(total_steps)

    def reconfigure(self, config: BasicCacheConfig, calibrator_config: CalibratorConfig | None) -> None:
        """Take on another configuration and start afresh."""
        for section in self.sections:
            _check_fits(section, config)
        config.resolve_mask(config.num_inference_steps)
        self.config, self.calibrator_config = config, calibrator_config
        for section in self.sections:
            section.configure(config.Fn_compute_blocks, config.Bn_compute_blocks)
        self.branches.clear()
        self.warned_about_idling = False
        self.begin_request(config.num_inference_steps)

    def _branch(self) -> Branch:
        """The branch that this call belongs to; starts a new request where the last one has had all its steps."""
        name = getattr(_thread, "names", {}).get(id(self))
        if name is None:
            name = self._name_by_call_order()
        branch = self.branches.get(name)
        if (
            branch is not None
            and self.config.num_inference_steps is not None
            and branch.step >= self.config.num_inference_steps
        ):
            self.begin_request(self.config.num_inference_steps)
        if branch is None:
            branch = Branch(name, self.sections, self.config, self.calibrator_config, self.total_steps)
            self.branches[name] = branch
        return branch

    def _name_by_call_order(self) -> str:
        separate = self.config.enable_separate_cfg
        if not (self.has_separate_cfg if separate is None else separate):
            return "default"
        return "uncond" if (self.calls % 2 == 0) == self.config.cfg_compute_first else "cond"

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Run the forwards inside on the branch ``name``; diffusers pipelines call it around each guidance branch.

        ``where`` tells diffusers' own hooks where the denoising loop is (``step_index``, ``sigma``, ...).
        """
        names = _thread.__dict__.setdefault("names", {})
        outer = names.get(id(self))
        names[id(self)] = name
        try:
            original = getattr(type(self.transformer), "cache_context", None)
            if original is None:
                yield
            else:
                with original(self.transformer, name, **where):
                    yield
        finally:
            if outer is None:
                del names[id(self)]
            else:
                names[id(self)] = outer

    # One forward

    def forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the transformer's own forward with its block lists handing out sites."""
        if not self.attached or self._wants_gradients():
            return original(*args, **kwargs)
        branch = self._branch()
        step = branch.step
        runs = [SectionRun(section, state) for section, state in zip(self.sections, branch.states, strict=True)]
        try:
            with run_sections(self, runs):
                output = original(*args, **kwargs)
            for run in runs:
                run.close()
                if run.bypassed:
                    self._warn_about_gradients("the blocks' inputs")
        except BaseException:
            branch.rewind(step)
            raise
        self.calls += 1
        if branch.step == self.total_steps and not self.warned_about_idling:
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
                "the cache never triggered on %s.%s in a request of %d steps: %s; the smallest residual diff was %s, "
                "residual_diff_threshold is %s",
                type(self.transformer).__name__,
                section.name,
                len(records),
                ", ".join(f"{reason or 'not cached'} {count}x" for reason, count in reasons.items()),
                f"{min(diffs):.4f}" if diffs else "never measured",
                self.config.residual_diff_threshold,
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
        if hasattr(module, "cache_context"):
            _put(module, "cache_context", self.cache_context)
        _put(module, _ATTRIBUTE, self)
        self.attached = True

    def detach(self) -> None:
        """Take the cache off; what was there before is put back."""
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
        self.branches.clear()


def controller_of(module: Any) -> Controller | None:
    """Return the controller of a transformer that the cache is enabled on, else None."""
    module = getattr(module, "_orig_mod", module)
    return getattr(module, "__dict__", {}).get(_ATTRIBUTE)


def _check_fits(section: Section, config: BasicCacheConfig) -> None:
    computed = config.Fn_compute_blocks + config.Bn_compute_blocks
    if computed > section.total:
        raise ValueError(
            f"Fn_compute_blocks + Bn_compute_blocks = {computed} ({config.Fn_compute_blocks} + "
            f"{config.Bn_compute_blocks}) is more than the {section.total} blocks of {section.name}"
        )


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
