"""vLLM-Omni's cache backends: its calls and configuration, on this package (docs/vllm-omni.md).

Which transformers of a pipeline are cached, and how their blocks look, is in :mod:`cachedit.integrations.denoisers`, by
the names of vLLM-Omni's pipeline classes.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..api import disable_cache, enable_cache, refresh_context
from ..calibrator import CalibratorConfig, TaylorSeerCalibratorConfig
from ..config import BasicCacheConfig, DBCacheConfig
from ..mask import steps_mask
from ..modifier import ParamsModifier
from ..teacache import TeaCacheConfig
from .denoisers import DENOISERS, Denoiser

__all__ = [
    "ENABLERS",
    "CacheDiTBackend",
    "Denoiser",
    "DiffusionCacheConfig",
    "Enabled",
    "TeaCacheBackend",
    "enabler",
    "register_enabler",
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class DiffusionCacheConfig:
    """What vLLM-Omni's users give as ``cache_config``, with its defaults.

    Args:
        rel_l1_thresh, coefficients: Fields of :class:`TeaCacheConfig`, for the TeaCache backend.
        Fn_compute_blocks, Bn_compute_blocks, max_warmup_steps, max_cached_steps, max_continuous_cached_steps,
            residual_diff_threshold, force_refresh_step_hint, force_refresh_step_policy: Fields of
            :class:`DBCacheConfig`.
        num_inference_steps: Steps of a request, until ``refresh`` says otherwise.
        enable_taylorseer, taylorseer_order: Forecast reused steps.
        scm_steps_mask_policy: Name of a mask of steps, or None.
        scm_steps_policy: What the mask's zeros mean, ``"dynamic"`` or ``"static"``.
    """

    rel_l1_thresh: float = 0.2
    coefficients: Sequence[float] | str | None = None
    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    max_warmup_steps: int = 4
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = 3
    residual_diff_threshold: float = 0.24
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"
    num_inference_steps: int | None = None
    enable_taylorseer: bool = False
    taylorseer_order: int = 1
    scm_steps_mask_policy: str | None = None
    scm_steps_policy: str = "dynamic"

    @classmethod
    def of(cls, given: Any) -> DiffusionCacheConfig:
        """Take the fields of vLLM-Omni's object, of a dictionary, or None for the defaults.

        Raises:
            ValueError: For a key that is not a field; an object may have other attributes.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if given is None:
            return cls()
        if isinstance(given, Mapping):
            unknown = [key for key in given if key not in names]
            if unknown:
                raise ValueError(f"cache_config: {unknown[0]} is none of {', '.join(names)}")
            return cls(**given)
        return cls(**{name: getattr(given, name) for name in names if hasattr(given, name)})

    def cache_config(self) -> BasicCacheConfig:
        """The configuration to enable with; the mask comes with the steps."""
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(DBCacheConfig)}
        return DBCacheConfig(**{name: getattr(self, name) for name in shared})

    def calibrator_config(self) -> CalibratorConfig | None:
        """How reused steps are forecast."""
        return TaylorSeerCalibratorConfig(taylorseer_order=self.taylorseer_order) if self.enable_taylorseer else None

    def for_steps(self, steps: int) -> BasicCacheConfig:
        """What changes with a request's number of steps: a partial configuration for ``refresh_context``."""
        partial = DBCacheConfig().reset(num_inference_steps=steps)
        if self.scm_steps_mask_policy is None:
            return partial
        if steps >= 8 or steps in (4, 6):
            mask = steps_mask(mask_policy=self.scm_steps_mask_policy, total_steps=steps)
            return partial.update(steps_computation_mask=mask, steps_computation_policy=self.scm_steps_policy)
        # No mask has so few steps, as in the engine's own warm-up of one: this one is as good as none.
        warmup = min(self.max_warmup_steps, steps)
        mask = [1] * warmup + [0] * (steps - warmup)
        return partial.update(steps_computation_mask=mask, steps_computation_policy="dynamic")


class _TeaCacheSettings(DiffusionCacheConfig):
    def cache_config(self) -> BasicCacheConfig:
        return TeaCacheConfig(
            rel_l1_thresh=self.rel_l1_thresh,
            coefficients=self.coefficients,
            num_inference_steps=self.num_inference_steps,
        )

    def calibrator_config(self) -> None:
        return None

    def for_steps(self, steps: int) -> BasicCacheConfig:
        return DBCacheConfig().reset(num_inference_steps=steps)


class Enabled(NamedTuple):
    """What an enabler has done: how to go on to a request of so many steps, and what to disable."""

    refresh: Callable[[Any, int, bool], None]
    transformers: list[nn.Module]


Enabler = Callable[[Any, DiffusionCacheConfig], Enabled]


def enabler(*denoisers: Denoiser) -> Enabler:
    """Return an enabler for pipelines with these transformers.

    Of two transformers the first denoises at timesteps from ``boundary_ratio`` of the training timesteps up, and the
    other below; with more, or where the pipeline has no ``boundary_ratio``, each denoises at all steps.
    """

    def enable(pipeline: Any, config: DiffusionCacheConfig) -> Enabled:
        found = [(row, module) for row in denoisers if (module := row.find(pipeline)) is not None]
        if not found:
            paths = ", ".join(row.path for row in denoisers)
            raise ValueError(f"pipeline: {type(pipeline).__name__} has no transformer at {paths}")
        targets = [(row, row.target(pipeline, module)) for row, module in found]
        transformers = [module for _, module in found]
        try:
            for row, target in targets:
                modifiers = [ParamsModifier(**fields) for fields in row.modifiers] or None
                enable_cache(target, config.cache_config(), config.calibrator_config(), params_modifiers=modifiers)
        except BaseException:
            _disable(transformers)
            raise
        for row, _ in found:
            if row.paired:
                pipeline._cache_dit_requires_paired_cfg = True

        def refresh(pipeline: Any, steps: int, verbose: bool) -> None:
            for (row, transformer), share in zip(found, _shares(pipeline, steps, len(found)), strict=True):
                if share:
                    changed = config.for_steps(share)
                    if row.reads:
                        changed.num_inference_steps = None  # would end the request before its last step
                    refresh_context(transformer, changed, verbose=verbose)

        return Enabled(refresh, transformers)

    return enable


def _shares(pipeline: Any, steps: int, transformers: int) -> list[int]:
    """How many of a request's steps each transformer does."""
    if transformers != 2 or not hasattr(pipeline, "boundary_ratio"):
        return [steps] * transformers
    if pipeline.boundary_ratio is None:
        return [steps, 0]
    scheduler = copy.deepcopy(pipeline.scheduler)  # the pipeline's own goes on as it is
    scheduler.set_timesteps(steps)
    boundary = pipeline.boundary_ratio * scheduler.config.num_train_timesteps
    high = sum(float(time) >= boundary for time in scheduler.timesteps)
    return [high, steps - high]


def _disable(transformers: Sequence[nn.Module]) -> None:
    for transformer in transformers:
        disable_cache(transformer)


ENABLERS: dict[str, Enabler] = {name: enabler(*denoisers) for name, denoisers in DENOISERS.items()}


def register_enabler(pipeline_class_name: str) -> Callable[[Enabler], Enabler]:
    """Return a decorator that registers an enabler for pipelines of this class, in place of one that is there.

    An enabler is called with the pipeline and the :class:`DiffusionCacheConfig`, enables the cache, and returns an
    :class:`Enabled`. Most are made from data:

        >>> register_enabler("MyPipeline")(enabler(Denoiser(blocks={"layers": ForwardPattern.Pattern_3})))
    """

    def register(function: Enabler) -> Enabler:
        ENABLERS[pipeline_class_name] = function
        return function

    return register


class CacheDiTBackend:
    """vLLM-Omni's backend ``cache_dit``.

    Args:
        cache_config: vLLM-Omni's object, a dictionary of its fields, or None: see :class:`DiffusionCacheConfig`.

    Raises:
        ValueError: For a key of the dictionary that is not a field.
    """

    _settings: type[DiffusionCacheConfig] = DiffusionCacheConfig

    def __init__(self, cache_config: Any = None):
        self.config = self._settings.of(cache_config)
        self.enabled = False
        self._enabled: Enabled | None = None

    def enable(self, pipeline: Any) -> None:
        """Put the cache on the pipeline's transformers.

        Raises:
            ValueError, TypeError: If the configuration or the blocks do not fit. Nothing is changed then.
            NotImplementedError: If vLLM-Omni has blocks of its own inside ``cache_dit`` for this model.
        """
        name = type(pipeline).__name__
        enable = ENABLERS.get(name)
        if enable is None:  # the transformers that the pipeline names, each by what it declares or by its class
            paths = getattr(pipeline, "_dit_modules", None)
            enable = enabler(*map(Denoiser, paths if isinstance(paths, (list, tuple)) else ("transformer",)))
        self._enabled = enable(pipeline, self.config)
        self.enabled = True
        logger.info("%s enabled on %s", type(self).__name__, name)

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Begin a request of ``num_inference_steps`` steps; only warns where nothing is enabled."""
        if self._enabled is None:
            logger.warning("%s.refresh: not enabled on %s", type(self).__name__, type(pipeline).__name__)
            return
        self._enabled.refresh(pipeline, num_inference_steps, verbose)

    def disable(self, pipeline: Any) -> None:
        """Take the cache off again; nothing happens where it is not on."""
        if self._enabled is not None:
            _disable(self._enabled.transformers)
        self._enabled, self.enabled = None, False

    def is_enabled(self) -> bool:
        """Whether ``enable`` has been called, and ``disable`` has not."""
        return self.enabled

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config})"


class TeaCacheBackend(CacheDiTBackend):
    """vLLM-Omni's backend ``tea_cache``.

    Args:
        cache_config: As for :class:`CacheDiTBackend`; ``rel_l1_thresh`` and ``coefficients`` of it count.
        rel_l1_thresh: Replaces that of ``cache_config``.

    Raises:
        ValueError: From ``enable``, also where there are no coefficients for the model, or nothing to measure is known.
    """

    _settings = _TeaCacheSettings

    def __init__(self, cache_config: Any = None, rel_l1_thresh: float | None = None):
        super().__init__(cache_config)
        if rel_l1_thresh is not None:
            self.config.rel_l1_thresh = rel_l1_thresh
