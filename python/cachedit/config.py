"""Configuration objects: names, defaults and meanings as users know them from ``cache_dit``."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from .mask import MASK_POLICIES, check_mask, steps_mask

if TYPE_CHECKING:
    from .policy import Policy, StepPolicy

__all__ = [
    "BasicCacheConfig",
    "CacheType",
    "DBCacheConfig",
    "DBPruneConfig",
    "PolicyConfig",
]

Config = TypeVar("Config", bound="_Config")


class CacheType(Enum):
    """What a cache configuration asks for."""

    NONE = "NONE"
    DBCache = "DBCache"
    DBPrune = "DBPrune"
    TeaCache = "TeaCache"

    def __str__(self) -> str:
        return self.value

    @staticmethod
    def type(type_hint: CacheType | str | None = None) -> CacheType:
        """Same as :func:`cachedit.cache_type`."""
        from .cache_types import cache_type

        return cache_type(type_hint)


@dataclasses.dataclass
class _Config:
    """What all configurations share: partial updates and export."""

    def update(self: Config, **kwargs: Any) -> Config:
        """Set the given fields in place, except those given as None, and return ``self``.

        ``num_inference_steps=0`` sets nothing either: engines say so of a transformer that a request leaves out.

        Raises:
            TypeError: For a name that is not a field.
        """
        names = {field.name for field in dataclasses.fields(self)}
        unknown = sorted(set(kwargs) - names)
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(sorted(names))}"
            raise TypeError(f"{type(self).__name__} has no field {unknown[0]!r}; {hint}")
        for name, value in kwargs.items():
            if value is not None and (name, value) != ("num_inference_steps", 0):
                setattr(self, name, value)
        return self

    def empty(self: Config, **kwargs: Any) -> Config:
        """Set every field to None, then apply ``kwargs``: a partial configuration for ``refresh_context``."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, None)
        return self.update(**kwargs)

    reset = empty

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class BasicCacheConfig(_Config):
    """When to compute and when to reuse the blocks between the first Fn and the last Bn.

    Args:
        cache_type: Kind of cache.
        Fn_compute_blocks: Blocks at the start that are always computed; how far their residual moved since the last
            computed step decides the step. At least 1.
        Bn_compute_blocks: Blocks at the end that are always computed.
        residual_diff_threshold: A step is reused when the relative L1 difference of the first blocks' residual is
            below this. 0 or less never reuses.
        max_accumulated_residual_diff_threshold: Compute once the differences of a run of reused steps add up to this.
        max_warmup_steps: Steps ``range(0, max_warmup_steps, warmup_interval)`` are computed.
        warmup_interval: See ``max_warmup_steps``.
        max_cached_steps: Reuse at most so many steps per request (-1: no limit).
        max_continuous_cached_steps: Reuse at most so many steps in a row (-1: no limit).
        enable_separate_cfg: The pipeline calls the transformer once per guidance branch, in turn. None: as the
            pipeline's ``cache_context`` calls or the adapter say.
        cfg_compute_first: With separate branches in turn, the unconditional one comes first.
        cfg_diff_compute_separate: Each branch measures its own difference. False has the branch that runs second take
            over that of the first; without effect on DBPrune, whose blocks differ by their inputs.
        num_inference_steps: Denoising steps of a request; pipelines tell it by themselves. With a bare transformer,
            a new request begins after so many calls (per branch).
        steps_computation_mask: One entry per step, 1 computes and 0 may reuse; or the name of a policy
            (:func:`cachedit.steps_mask`), resolved when a request's step count is known.
        steps_computation_policy: For the zeros of the mask: ``"dynamic"`` measures, ``"static"`` always reuses.
        force_refresh_step_hint: At this step of the transformer the cache starts over.
        force_refresh_step_policy: ``"once"`` per request, or ``"repeat"`` at each multiple of the hint.
        residual_float8: Hold stored residuals in E4M3 with a float32 scale per token: half the memory of bfloat16, for
            some quality (docs/policies.md). What differences are measured against keeps the model's dtype.
    """

    cache_type: CacheType = CacheType.DBCache
    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    num_inference_steps: int | None = None
    steps_computation_mask: Sequence[int] | str | None = None
    steps_computation_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"
    residual_float8: bool = dataclasses.field(default=False, kw_only=True)

    def validate(self) -> None:
        """Check types and ranges of every field.

        Raises:
            ValueError: For a value out of range; the message names the field, what was expected and what came.
            TypeError: For a value of the wrong type.
        """
        if self.cache_type not in (type(self).cache_type, CacheType.NONE):
            raise ValueError(
                f"cache_type must be CacheType.{type(self).cache_type} or CacheType.NONE in a {type(self).__name__}, "
                f"got {self.cache_type!r}"
            )
        _check_int("Fn_compute_blocks", self.Fn_compute_blocks, 1)
        _check_int("Bn_compute_blocks", self.Bn_compute_blocks, 0)
        _check_real("residual_diff_threshold", self.residual_diff_threshold)
        if self.max_accumulated_residual_diff_threshold is not None:
            _check_real("max_accumulated_residual_diff_threshold", self.max_accumulated_residual_diff_threshold)
        _check_int("max_warmup_steps", self.max_warmup_steps, 0)
        _check_int("warmup_interval", self.warmup_interval, 1)
        _check_int("max_cached_steps", self.max_cached_steps, -1)
        _check_int("max_continuous_cached_steps", self.max_continuous_cached_steps, -1)
        if self.num_inference_steps is not None:
            _check_int("num_inference_steps", self.num_inference_steps, 1)
        if self.force_refresh_step_hint is not None:
            _check_int("force_refresh_step_hint", self.force_refresh_step_hint, 1)
        if self.steps_computation_policy not in MASK_POLICIES:  # SGLang refreshes with the mask's name: as "dynamic"
            _check_choice("steps_computation_policy", self.steps_computation_policy, ("dynamic", "static"))
        _check_choice("force_refresh_step_policy", self.force_refresh_step_policy, ("once", "repeat"))
        if self.enable_separate_cfg is not None:
            _check_bool("enable_separate_cfg", self.enable_separate_cfg)
        for name in ("cfg_compute_first", "cfg_diff_compute_separate", "residual_float8"):
            _check_bool(name, getattr(self, name))
        self.resolve_mask(self.num_inference_steps)

    def resolve_mask(self, total_steps: int | None) -> list[int] | None:
        """Return the mask for a request of ``total_steps``, or None if there is none (or a name, but no count yet)."""
        mask = self.steps_computation_mask
        if mask is None:
            return None
        if not isinstance(mask, str):
            return check_mask(mask, total_steps)
        _check_choice("steps_computation_mask", mask, MASK_POLICIES)
        return None if total_steps is None else steps_mask(total_steps=total_steps, mask_policy=mask)

    def make_policy(self, total_steps: int | None) -> Policy:
        """Return the policy of one request, branch and section."""
        from .policy import Policy

        return Policy(self, total_steps)

    def strify(self) -> str:
        """Return a short tag of the settings, for logs and file names."""
        tag = (
            f"{self.cache_type}_F{self.Fn_compute_blocks}B{self.Bn_compute_blocks}"
            f"_W{self.max_warmup_steps}I{self.warmup_interval}M{max(0, self.max_cached_steps)}"
            f"MC{max(0, self.max_continuous_cached_steps)}_R{self.residual_diff_threshold}"
        )
        if self.steps_computation_mask is not None:
            tag += f"_SCM{''.join(map(str, self.steps_computation_mask))}_{self.steps_computation_policy}"
        if self.num_inference_steps is not None:
            tag += f"_N{self.num_inference_steps}"
        if self.force_refresh_step_hint is not None:
            tag += f"_FR{self.force_refresh_step_hint}_{self.force_refresh_step_policy}"
        if self.enable_separate_cfg is not None:
            tag += f"_CFG{int(self.enable_separate_cfg)}"
        if self.residual_float8:
            tag += "_FP8"
        return tag


@dataclasses.dataclass
class DBCacheConfig(BasicCacheConfig):
    """Dual Block Cache: see :class:`BasicCacheConfig` for the fields."""


@dataclasses.dataclass
class DBPruneConfig(BasicCacheConfig):
    """Dynamic block pruning: each block decides for itself, by how far its input moved since it was last computed.

    A pruned block adds its stored residual in place of being computed. The first Fn and the last Bn blocks are always
    computed; warm-up, masks and the limits on cached steps, which count steps with a pruned block, hold for all blocks
    of a step. See :class:`BasicCacheConfig` for the other fields.

    Args:
        enable_dynamic_prune_threshold: Follow the step: the mean of its first five positive differences times
            ``dynamic_prune_threshold_relax_ratio`` is the threshold where it is above ``residual_diff_threshold`` and
            below ``max_dynamic_prune_threshold``.
        max_dynamic_prune_threshold: See there. Default: twice ``residual_diff_threshold``.
        dynamic_prune_threshold_relax_ratio: See there.
        non_prune_block_ids: Further blocks that are always computed, numbered from 0 through all lists of a section.
        force_reduce_calibrator_vram: With a calibrator, keep and compare every fourth token of the blocks' inputs only.
    """

    cache_type: CacheType = CacheType.DBPrune
    enable_dynamic_prune_threshold: bool = False
    max_dynamic_prune_threshold: float | None = None
    dynamic_prune_threshold_relax_ratio: float = 1.25
    non_prune_block_ids: list[int] = dataclasses.field(default_factory=list)
    force_reduce_calibrator_vram: bool = False

    def validate(self) -> None:
        """Check types and ranges of every field."""
        super().validate()
        for name in ("enable_dynamic_prune_threshold", "force_reduce_calibrator_vram"):
            _check_bool(name, getattr(self, name))
        if self.max_dynamic_prune_threshold is not None:
            _check_real("max_dynamic_prune_threshold", self.max_dynamic_prune_threshold)
        _check_real("dynamic_prune_threshold_relax_ratio", self.dynamic_prune_threshold_relax_ratio)
        if not isinstance(self.non_prune_block_ids, Sequence) or isinstance(self.non_prune_block_ids, str):
            raise TypeError(f"non_prune_block_ids must be a list of block numbers, got {self.non_prune_block_ids!r}")
        for position, block in enumerate(self.non_prune_block_ids):
            _check_int(f"non_prune_block_ids[{position}]", block, 0)

    def prunable_blocks(self, total: int) -> frozenset[int]:
        """Numbers of the blocks, of ``total``, that may be pruned."""
        inner = range(self.Fn_compute_blocks, total - self.Bn_compute_blocks)
        return frozenset(inner) - frozenset(self.non_prune_block_ids)


@dataclasses.dataclass
class PolicyConfig(BasicCacheConfig):
    """DBCache with a policy of one's own in place of warm-up, mask, limits and threshold; these have no effect.

    Args:
        policy: A class (or function) without arguments that makes a :class:`cachedit.StepPolicy`. It is called once
            per request, guidance branch and section.
    """

    policy: Callable[[], StepPolicy] | None = None

    def validate(self) -> None:
        """Check types and ranges of every field."""
        super().validate()
        if not callable(self.policy):
            raise TypeError(f"policy must be a class or function that makes a StepPolicy, got {self.policy!r}")

    def make_policy(self, total_steps: int | None) -> Policy:
        """Return the policy of one request, branch and section."""
        from .policy import UserPolicy

        return UserPolicy(self, total_steps)


def _check_int(name: str, value: Any, at_least: int, at_most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least or (at_most is not None and value > at_most):
        expected = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got NaN")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
