"""Puts parallelism on transformers and on what else a pipeline has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .async_ulysses import check_send_early, send_early
from .attention import LSE_BACKENDS, SequenceAttention
from .config import ParallelismConfig, Sizes
from .extra import Extra, find_extra
from .groups import Groups
from .plans import UNSPLIT, ContextPlan, attention_modules, find_plan
from .processors import parallelise_attention
from .split import Pieces, hook_plan
from .state import ATTRIBUTE, SHARDS, OnModule, disable_parallelism
from .tensor import check_tensor_parallel, shard_transformer
from .text_encoder import shard_text_encoder
from .vae import share_tiles

__all__ = ["Parallelism", "enable_parallelism", "prepare_parallelism", "process_group"]

logger = logging.getLogger(__name__)


class Parallelism(NamedTuple):
    """What has been checked, and is to be enabled."""

    config: ParallelismConfig
    sizes: Sizes
    group: dist.ProcessGroup
    transformers: list[tuple[nn.Module, ContextPlan | None]]
    """What is split and cut, ControlNets among them; where sequences are split, with the plan."""
    others: list[Extra]

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        fields = self.config.as_dict()
        fields.pop("process_group")
        fields["cp_plan"] = str(fields["cp_plan"])
        fields["extra_parallel_modules"] = [
            item if isinstance(item, str) else type(item).__name__ for item in fields["extra_parallel_modules"]
        ]
        fields["transformer"] = [type(transformer).__name__ for transformer, _ in self.transformers]
        fields["parameters"] = [sum(p.numel() for p in t.parameters()) for t, _ in self.transformers]
        return fields


def process_group(config: Any) -> dist.ProcessGroup:
    """The ranks that take part.

    Raises:
        TypeError: For another configuration, or something else than a process group in it.
        RuntimeError: Where torch.distributed has not been initialised.
    """
    if not isinstance(config, ParallelismConfig):
        raise TypeError(f"parallelism_config must be a ParallelismConfig, got {type(config).__name__}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "parallelism_config: torch.distributed is not initialised; launch with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    if not isinstance(config.process_group, dist.ProcessGroup | None):
        raise TypeError(f"process_group must be one that this rank is in, got {config.process_group!r}")
    return dist.distributed_c10d._get_default_group() if config.process_group is None else config.process_group


def prepare_parallelism(
    transformers: Sequence[nn.Module], pipe: Any, config: ParallelismConfig, group: dist.ProcessGroup
) -> Parallelism:
    """Check everything that can be wrong before anything is changed.

    Args:
        transformers: What is shared out.
        pipe: Has ``extra_parallel_modules`` that are given by name.
        config: How.
        group: The ranks that take part.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    config.validate()
    sizes = config.sizes(dist.get_world_size(group))
    if config.attention_backend is not None:
        _check_backend(config.attention_backend, sizes)
    extra = find_extra(pipe, config.extra_parallel_modules)
    others = [item for item in extra if item.kind != "controlnet"]
    for item in others:
        if vars(item.module).get(ATTRIBUTE) is None:
            _check_shards(item.module, sizes.total, item.check, group)
    rows: list[tuple[nn.Module, ContextPlan | None]] = []
    for transformer in (*transformers, *(item.module for item in extra if item.kind == "controlnet")):
        if sizes.tp > 1 or SHARDS in vars(transformer):
            _check_shards(transformer, sizes.tp, check_tensor_parallel, transformer, sizes.tp)
        row = find_plan(transformer, config.cp_plan if transformer in transformers else None)
        if sizes.sequence > 1 and row is None:
            name = type(transformer).__name__
            reason = UNSPLIT.get(name, "it is not known how to split it; give a cp_plan")
            raise ValueError(
                f"parallelism_config: {name} does not run on split sequences: {reason}; or use tp_size alone"
            )
        if config.ulysses_async and sizes.ulysses > 1 and row is not None:
            check_send_early(transformer, attention_modules(transformer, row))
        rows.append((transformer, row if sizes.sequence > 1 else None))
    return Parallelism(config, sizes, group, rows, others)


def _check_backend(name: str, sizes: Sizes) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = LSE_BACKENDS if sizes.ring > 1 else [backend.value for backend in AttentionBackendName]
    if name not in names:
        for_ring = " for ring attention" if sizes.ring > 1 else ""
        raise ValueError(f"attention_backend must be one of {', '.join(names)}{for_ring}, got {name!r}")


def _check_shards(module: nn.Module, shards: int, check: Callable[..., None], *args: Any) -> None:
    """Weights that have been cut already are as they should be, or an error; others are looked at by ``check``."""
    have = vars(module).get(SHARDS)
    if have is None:
        check(*args)
    elif have != shards:
        raise ValueError(
            f"tp_size: the weights of this {type(module).__name__} have been cut for {have} ranks, not {shards}; "
            "load them again"
        )


def enable_parallelism(parallelism: Parallelism) -> None:
    """Put it on; what was there before of the same kind is taken off first."""
    for transformer, row in parallelism.transformers:
        disable_parallelism(transformer)
        groups = Groups(parallelism.sizes, parallelism.group, _device(transformer))
        undo: list[Callable[[], None]] = []
        try:
            if groups.tp_mesh is not None and SHARDS not in vars(transformer):
                shard_transformer(transformer, groups.tp_mesh)
                vars(transformer)[SHARDS] = parallelism.sizes.tp
            if row is not None:
                _split(transformer, row, groups, parallelism.config, undo)
        except BaseException:
            _unwind(undo)
            raise
        vars(transformer)[ATTRIBUTE] = OnModule(groups.sequence, partial(_unwind, undo))
        logger.info("parallelism enabled on %s: %s", type(transformer).__name__, parallelism.config.strify())
    for name, module, kind in parallelism.others:
        if kind == "vae":
            disable_parallelism(module)
            vars(module)[ATTRIBUTE] = OnModule(None, share_tiles(module, parallelism.group).undo)
        elif SHARDS not in vars(module):
            shard_text_encoder(module, DeviceMesh.from_group(parallelism.group, _device(module)))
            vars(module)[SHARDS] = parallelism.sizes.total
        logger.info("parallelism enabled on %s: %s", name, "tiles" if kind == "vae" else "tensor parallel")


def _device(module: nn.Module) -> str:
    return next(module.parameters()).device.type


def _split(
    transformer: nn.Module,
    row: ContextPlan,
    groups: Groups,
    config: ParallelismConfig,
    undo: list[Callable[[], None]],
) -> None:
    assert groups.sequence is not None
    pieces = Pieces(groups.sequence, row.joined)
    undo.append(hook_plan(transformer, row.plan, pieces))
    modules = attention_modules(transformer, row)
    attention = SequenceAttention(groups, config, pieces, _backend_of(modules))
    if config.ulysses_async and groups.ulysses is not None:
        undo.append(send_early(transformer, modules, attention))
    undo.append(parallelise_attention(modules, attention))


def _backend_of(modules: Sequence[Any]) -> str | None:
    """The backend that was set on a model's processors, if any."""
    backends = [getattr(module.processor, "_attention_backend", None) for module in modules]
    return next((str(getattr(backend, "value", backend)) for backend in backends if backend is not None), None)


def _unwind(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()
