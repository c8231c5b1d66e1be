"""The functions that users call: enable, disable, refresh, summarise."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .attention import set_attention_backend, transformers_of
from .calibrator import CalibratorConfig
from .config import BasicCacheConfig, CacheType, DBCacheConfig
from .controller import Controller
from .cuda_graphs import ForwardGraphs
from .modifier import Settings, modified
from .parallel.state import disable_parallelism, sequence_group
from .prepare import Prepared, agree_on, prepare_caches
from .quantization import prepare_quantization
from .stats import CacheStats, collect, format_table
from .targets import controllers_of, enabled_controllers, modules_of
from .watch import PipelineWatch

__all__ = [
    "disable_cache",
    "drop_request",
    "enable_cache",
    "enable_cuda_graphs",
    "limit_requests",
    "refresh_context",
    "request",
    "summary",
]

logger = logging.getLogger(__name__)


def enable_cache(
    pipe_or_adapter: Any,
    cache_config: BasicCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    params_modifiers: Any = None,
    parallelism_config: Any = None,
    attention_backend: str | None = None,
    quantize_config: Any = None,
) -> Any:
    """Put the cache on a pipeline, a transformer, or whatever a :class:`BlockAdapter` describes.

    Only these objects change, not their classes. Enabling again replaces the configuration.

    Args:
        pipe_or_adapter: A diffusers pipeline, a transformer (``torch.nn.Module``) of a known class, or a BlockAdapter.
        cache_config: When to reuse. Default: ``DBCacheConfig()``. With ``CacheType.NONE`` nothing is enabled, and what
            was is disabled.
        calibrator_config: How to forecast reused steps. Default: the last residual as it is.
        params_modifiers: One :class:`ParamsModifier` for everything, one per block list, or with several transformers
            one (or a list) per transformer; None where the common settings hold. Default: the adapter's.
        parallelism_config: How ranks share the work, a :class:`ParallelismConfig`; every rank makes the same call.
        attention_backend: Name of a diffusers attention backend to set on the transformers.
        quantize_config: A :class:`QuantizeConfig`: linear layers are quantized first of all, see :func:`quantize`.
            Where this, ``attention_backend`` or ``parallelism_config`` is given without a ``cache_config``, no cache
            is enabled.

    Returns:
        What was given.

    Raises:
        ValueError, TypeError: For a configuration or an adapter that does not fit, on every rank if it is so on one.
            Nothing is changed then.
        RuntimeError: For a ``parallelism_config`` where torch.distributed has not been initialised.
        ImportError, NotImplementedError: For a ``quantize_config`` without torchao; for a type that is not here yet.

    Example:
        >>> cachedit.enable_cache(pipe, DBCacheConfig(Fn_compute_blocks=1), TaylorSeerCalibratorConfig())
        >>> image = pipe("a cat").images[0]
        >>> cachedit.summary(pipe)
    """
    nothing_else = attention_backend is None and parallelism_config is None and quantize_config is None
    caches = cache_config is not None or nothing_else

    def prepare() -> Prepared:
        quantization = None if quantize_config is None else prepare_quantization(pipe_or_adapter, quantize_config)
        if not caches:
            return Prepared(None, [], transformers_of(pipe_or_adapter), quantization)
        common = Settings(DBCacheConfig() if cache_config is None else cache_config, calibrator_config)
        return prepare_caches(pipe_or_adapter, common, params_modifiers)._replace(quantization=quantization)

    if parallelism_config is None:
        prepared, parallel = prepare(), None
    else:
        prepared, parallel = agree_on(pipe_or_adapter, parallelism_config, prepare)
    pipe = prepared.pipe
    watch = None if pipe is None else PipelineWatch(pipe, prepared.transformers)  # raises for what is no pipeline
    if parallel is not None and parallel.config.attention_backend is not None:
        attention_backend = parallel.config.attention_backend
    if attention_backend is not None:
        for transformer in prepared.transformers if parallel is not None else ():
            disable_parallelism(transformer)  # it holds the backend's place
        set_attention_backend(prepared.transformers, attention_backend)
    if prepared.quantization is not None:
        prepared.quantization.apply()
    if parallel is not None:
        from .parallel.apply import enable_parallelism

        enable_parallelism(parallel)
        for controller in (*prepared.controllers, *controllers_of(pipe_or_adapter)):
            controller.join(sequence_group(controller.transformer))
    if not caches:
        return pipe_or_adapter
    if cache_config is not None and cache_config.cache_type is CacheType.NONE:
        logger.info("cache_type is NONE: nothing is enabled on %s", type(pipe_or_adapter).__name__)
        return _disable(pipe_or_adapter)
    watched = None if pipe is None else PipelineWatch.of(pipe)
    if watched is not None:
        watched.release(pipe)
    for controller in prepared.controllers:
        controller.attach()
        _announce(controller, pipe)
    if watch is not None:
        watch.attach()
    return pipe_or_adapter


def disable_cache(pipe_or_adapter: Any) -> Any:
    """Take the cache and parallelism off again; everything is as it was before, bit for bit.

    Weights that were cut for tensor parallelism stay cut, and those that were quantized stay quantized.

    Args:
        pipe_or_adapter: What ``enable_cache`` was given, or the pipeline or transformer within it.

    Returns:
        What was given. Nothing happens where nothing is enabled.
    """
    _disable(pipe_or_adapter)
    pipe = getattr(pipe_or_adapter, "pipe", pipe_or_adapter)
    for module in (*modules_of(pipe_or_adapter), *getattr(pipe, "components", {}).values()):
        if isinstance(module, nn.Module):
            disable_parallelism(module)
    return pipe_or_adapter


def _disable(pipe_or_adapter: Any) -> Any:
    for controller in controllers_of(pipe_or_adapter):
        controller.detach()
    pipe = getattr(pipe_or_adapter, "pipe", pipe_or_adapter)
    watched = PipelineWatch.of(pipe)
    if watched is not None:
        watched.release(pipe)
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
            keep what is set. A mask that is set, and has not as many entries as there are steps now, is left out.
        calibrator_config: A new calibrator configuration.
        verbose: Log the new configuration at INFO.
        **changes: Single fields of the cache configuration, such as ``num_inference_steps=28``.

    Raises:
        ValueError: If the cache is not enabled there, or a value does not fit. Nothing is changed then.
        TypeError: For a name that is not a field.
    """
    controllers = enabled_controllers("transformer", transformer)
    if cache_config is None and calibrator_config is None and not changes:
        for controller in controllers:
            controller.begin_request()
        return
    masked = "steps_computation_mask" in changes or getattr(cache_config, "steps_computation_mask", None) is not None
    updated = []
    for controller in controllers:
        settings = [modified(each, cache_config, calibrator_config) for each in controller.settings]
        for each in settings:
            each.config.update(**changes)
            if not masked:
                _leave_out_old_mask(each.config)
            each.check()
            if each.config.cache_type is CacheType.NONE:
                raise ValueError("cache_type must not be NONE in a refresh: disable_cache takes the cache off")
        updated.append((controller, settings))
    for controller, settings in updated:
        controller.reconfigure(settings)
        if verbose:
            tags = "; ".join(each.config.strify() for each in settings)
            logger.info("refreshed %s: %s", type(controller.transformer).__name__, tags)


def _leave_out_old_mask(config: BasicCacheConfig) -> None:
    mask, steps = config.steps_computation_mask, config.num_inference_steps
    if mask is not None and not isinstance(mask, str) and steps is not None and len(mask) != steps:
        logger.warning("the steps_computation_mask of %d steps is left out: there are %d now", len(mask), steps)
        config.steps_computation_mask = None


@contextmanager
def request(target: Any, key: Hashable, num_inference_steps: int | None = None) -> Iterator[None]:
    """Run the forwards inside, of this thread or asyncio task, on the state of one request of its own.

    A server that interleaves the steps of many requests on one model, from one thread or several, wraps each
    forward (or each run of a pipeline). State is made when a key is first used, and kept until
    :func:`drop_request` or a limit (:func:`limit_requests`) drops it.

    Args:
        target: The transformer (or pipeline, or adapter) that the cache is enabled on.
        key: Names the request; anything hashable.
        num_inference_steps: Denoising steps of the request, looked at when it begins. A forward after the last one
            begins anew. Default: as configured, or as the pipeline says.

    Raises:
        ValueError: If the cache is not enabled there, or the configuration's mask has another length.
        TypeError: If the key is not hashable.
        RuntimeError: From a forward, if another thread is in one of the same request.

    Example:
        >>> with cachedit.request(transformer, job.id, num_inference_steps=job.steps):
        ...     noise = transformer(**job.inputs())
    """
    with ExitStack() as stack:
        for controller in enabled_controllers("target", target):
            stack.enter_context(controller.use_request(key, num_inference_steps))
        yield


def drop_request(target: Any, key: Hashable) -> None:
    """Drop the state of a request and its buffers; nothing happens where there is none.

    Args:
        target: The transformer (or pipeline, or adapter) that the cache is enabled on.
        key: As given to :func:`request`.
    """
    for controller in controllers_of(target):
        controller.requests.drop(key)


def limit_requests(target: Any, max_requests: int = 256, max_bytes: int | None = None) -> None:
    """Limit how many requests keep state on a transformer, and how much; the least recently used give way.

    Args:
        target: The transformer (or pipeline, or adapter) that the cache is enabled on.
        max_requests: More than so many: the least recently used is dropped, and would start over.
        max_bytes: Buffers of all requests hold more than so many bytes: the least recently used ones are freed. Such
            a request goes on where it was, with its next step computed. None: no limit.

    Raises:
        ValueError: If the cache is not enabled there, or a limit is below 1.
    """
    for name, value in (("max_requests", max_requests), ("max_bytes", 1 if max_bytes is None else max_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    for controller in enabled_controllers("target", target):
        controller.requests.limit(max_requests, max_bytes)


def enable_cuda_graphs(pipe_or_transformer: Any, max_graphs: int = 16) -> Any:
    """Run steps as CUDA graphs, decided on the device where that can be. Experimental: not yet run on a GPU.

    With DBCache and plain reuse or TaylorSeer a step is one launch, whatever it turns out to be, and the host waits for
    nothing until the request ends or :func:`summary` is asked for. Otherwise (an INFO line says once why) the host
    decides: warm-up steps, steps that a limit computes and those of a static mask are replayed, steps that have to be
    measured run eagerly. What cannot be captured runs eagerly as well; :func:`summary` says how many, and why.

    Each kind of call (shapes, request, guidance branch) runs eagerly once. Call this again after changing modules (a
    LoRA does) or the attention backend. :func:`disable_cache` ends it.

    Args:
        pipe_or_transformer: What the cache is enabled on; it is returned.
        max_graphs: Keep so many graphs per transformer; the least recently used is dropped.

    Raises:
        ValueError: If the cache is not enabled there, its work is split among ranks, or ``max_graphs`` is below 1.
    """
    controllers = enabled_controllers("pipe_or_transformer", pipe_or_transformer)
    graphs = [ForwardGraphs(controller, max_graphs) for controller in controllers]
    for controller, its in zip(controllers, graphs, strict=True):
        controller.graphs = its
    return pipe_or_transformer


def summary(adapter_or_others: Any, details: bool = False, logging: bool = True) -> list[CacheStats]:
    """Return, and print, what the cache did in the running or last request.

    Args:
        adapter_or_others: A pipeline, transformer or adapter that the cache is enabled on.
        details: Print one row per step as well.
        logging: Print at all.

    Returns:
        One :class:`CacheStats` per transformer and section; empty where the cache is not enabled.
    """
    controllers = controllers_of(adapter_or_others)
    stats = [entry for controller in controllers for entry in collect(controller)]
    if logging:
        print(format_table(stats, details) if stats else "the cache is not enabled here")
        print(*(f"{controller.graphs}\n" for controller in controllers if controller.graphs), sep="", end="")
    return stats


def _announce(controller: Controller, pipe: Any) -> None:
    for section in controller.sections:
        calibrator = section.calibrator_config
        logger.info(
            "cache enabled on %s.%s (%d blocks): %s, %s",
            type(controller.transformer).__name__,
            section.name,
            section.total,
            section.config.strify(),
            calibrator.strify(details=True) if calibrator else "plain reuse",
        )
    if pipe is None and controller.config.num_inference_steps is None:
        logger.info(
            "no pipeline tells when a request starts: call refresh_context before each one, or set num_inference_steps"
        )
