"""The functions that users call: enable, disable, refresh, summarise."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn

from .adapter import BlockAdapter, TransformerPlan, plan_for
from .config import BasicCacheConfig, CalibratorConfig, DBCacheConfig
from .controller import Controller, controller_of
from .models import find_transformers
from .requests import PipelineWatch
from .stats import CacheStats, collect, format_table

__all__ = ["disable_cache", "enable_cache", "refresh_context", "summary"]

logger = logging.getLogger(__name__)


def enable_cache(
    pipe_or_adapter: Any,
    cache_config: BasicCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
) -> Any:
    """Put the cache on a pipeline, a transformer, or whatever a :class:`BlockAdapter` describes.

    Only these objects change, not their classes. Enabling again replaces the configuration.

    Args:
        pipe_or_adapter: A diffusers pipeline, a transformer (``torch.nn.Module``) of a known class, or a BlockAdapter.
        cache_config: When to reuse. Default: ``DBCacheConfig()``.
        calibrator_config: How to forecast reused steps. Default: the last residual as it is.

    Returns:
        What was given.

    Raises:
        ValueError, TypeError: For a configuration or an adapter that does not fit. Nothing is changed then.

    Example:
        >>> cachedit.enable_cache(pipe, DBCacheConfig(Fn_compute_blocks=1), TaylorSeerCalibratorConfig())
        >>> image = pipe("a cat").images[0]
        >>> cachedit.summary(pipe)
    """
    config = copy.deepcopy(cache_config) if cache_config is not None else DBCacheConfig()
    calibrator = copy.deepcopy(calibrator_config)
    _check_configs(config, calibrator)
    pipe, plans = _plans(pipe_or_adapter)
    controllers = [Controller(plan, config, calibrator) for plan in plans]
    watched = None if pipe is None else PipelineWatch.of(pipe)
    if watched is not None:
        watched.release()
    for controller in controllers:
        controller.attach()
        _announce(controller, pipe)
    if pipe is not None:
        PipelineWatch(pipe, controllers).attach()
    return pipe_or_adapter


def disable_cache(pipe_or_adapter: Any) -> Any:
    """Take the cache off again; everything is as it was before, bit for bit.

    Args:
        pipe_or_adapter: What ``enable_cache`` was given, or the pipeline or transformer within it.

    Returns:
        What was given. Nothing happens where the cache is not enabled.
    """
    for controller in _controllers(pipe_or_adapter):
        controller.detach()
    watched = PipelineWatch.of(getattr(pipe_or_adapter, "pipe", pipe_or_adapter))
    if watched is not None:
        watched.release()
    return pipe_or_adapter


def refresh_context(
    transformer: Any,
    cache_config: BasicCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    verbose: bool = False,
    **changes: Any,
) -> None:
    """Start a new request on a transformer, with another configuration or step count if given.

    For transformer-only use, where no pipeline tells when a request starts.

    Args:
        transformer: The transformer (or pipeline, or adapter) that the cache is enabled on.
        cache_config: A whole new configuration; or one made by ``DBCacheConfig().reset(...)``, whose None fields
            keep what is set.
        calibrator_config: A new calibrator configuration.
        verbose: Log the new configuration at INFO.
        **changes: Single fields of the cache configuration, such as ``num_inference_steps=28``.

    Raises:
        ValueError: If the cache is not enabled there, or a value does not fit. Nothing is changed then.
        TypeError: For a name that is not a field.
    """
    controllers = _controllers(transformer)
    if not controllers:
        raise ValueError(f"transformer: the cache is not enabled on this {type(transformer).__name__}")
    if cache_config is None and calibrator_config is None and not changes:
        for controller in controllers:
            controller.begin_request(controller.config.num_inference_steps)
        return
    updated = []
    for controller in controllers:
        config = copy.deepcopy(controller.config)
        given = {} if cache_config is None else {name: getattr(cache_config, name) for name in cache_config.as_dict()}
        config.update(**given).update(**changes)
        calibrator = copy.deepcopy(calibrator_config) or controller.calibrator_config
        _check_configs(config, calibrator)
        updated.append((controller, config, calibrator))
    for controller, config, calibrator in updated:
        controller.reconfigure(config, calibrator)
        if verbose:
            logger.info("refreshed %s: %s", type(controller.transformer).__name__, config.strify())


def summary(adapter_or_others: Any, details: bool = False, logging: bool = True) -> list[CacheStats]:
    """Return, and print, what the cache did in the running or last request.

    Args:
        adapter_or_others: A pipeline, transformer or adapter that the cache is enabled on.
        details: Print one row per step as well.
        logging: Print at all.

    Returns:
        One :class:`CacheStats` per transformer and section; empty where the cache is not enabled.
    """
    stats = [entry for controller in _controllers(adapter_or_others) for entry in collect(controller)]
    if logging:
        print(format_table(stats, details) if stats else "the cache is not enabled here")
    return stats


def _check_configs(config: Any, calibrator: Any) -> None:
    if not isinstance(config, BasicCacheConfig):
        raise TypeError(f"cache_config must be a DBCacheConfig, got {type(config).__name__}")
    if calibrator is not None and not isinstance(calibrator, CalibratorConfig):
        raise TypeError(f"calibrator_config must be a CalibratorConfig, got {type(calibrator).__name__}")
    config.validate()
    if calibrator is not None:
        calibrator.validate()


def _plans(target: Any) -> tuple[Any, list[TransformerPlan]]:
    """The pipeline, if there is one, and a plan per transformer."""
    if isinstance(target, BlockAdapter):
        return target.pipe, target.plans()
    if isinstance(target, nn.Module):
        return None, [plan_for(target)]
    transformers = find_transformers(target)
    if not transformers:
        raise TypeError(
            "pipe_or_adapter must be a pipeline with a transformer, a torch.nn.Module or a BlockAdapter, "
            f"got {type(target).__name__}"
        )
    return target, [plan_for(transformer, target) for transformer in transformers]


def _controllers(target: Any) -> list[Controller]:
    if isinstance(target, BlockAdapter):
        modules = target.transformer if target.transformer is not None else getattr(target.pipe, "transformer", [])
        modules = list(modules) if isinstance(modules, (list, tuple)) else [modules]
    elif isinstance(target, nn.Module):
        modules = [target]
    else:
        watched = PipelineWatch.of(target)
        if watched is not None:
            return [c for c in watched.controllers if c.attached]
        modules = list(find_transformers(target))
    return [c for c in map(controller_of, modules) if c is not None]


def _announce(controller: Controller, pipe: Any) -> None:
    blocks = ", ".join(f"{section.name} ({section.total} blocks)" for section in controller.sections)
    calibrator = controller.calibrator_config
    logger.info(
        "cache enabled on %s: %s; %s, %s",
        type(controller.transformer).__name__,
        blocks,
        controller.config.strify(),
        calibrator.strify(details=True) if calibrator else "plain reuse",
    )
    if pipe is None and controller.config.num_inference_steps is None:
        logger.info(
            "no pipeline tells when a request starts: call refresh_context before each one, or set num_inference_steps"
        )
