"""Tensor parallelism of text encoders, by transformers' own plans where a model has one, by rows of ours elsewhere."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from .tensor import check_counts, check_modules, check_weight, divide_counts
from .tensor_plans import ENCODER_PLANS, ENCODER_SHARES

__all__ = ["check_text_encoder", "shard_text_encoder"]

# transformers' names of styles, in torch's terms, and those for what stays whole.
STYLES: dict[str, Callable[[], Any]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
}
WHOLE = {"replicate", "replicated_with_grad_allreduce"}


def check_text_encoder(encoder: nn.Module, size: int) -> None:
    """Whether `encoder`, a transformers model, can be sharded over `size` ranks. Changes nothing.

    Raises:
        ValueError: No plan for this model, or a style in it that is not known here; heads (of keys and values, too) or
            widths that don't divide; weights that are quantised, offloaded, sharded already, or have adapters.
    """
    if size < 1:
        raise ValueError(f"size: expected 1 or more ranks, got {size}")
    check_modules(encoder, {}, size)
    for name, style in _plan_of(encoder).items():
        module: Any = encoder.get_submodule(name)
        check_weight(f"{name}.weight", module.weight)
        if style in ("colwise", "rowwise") and isinstance(module, nn.Linear):
            _check_width(encoder, name, module.out_features if style == "colwise" else module.in_features, size)
    check_counts(_counts(encoder), size)


def shard_text_encoder(encoder: nn.Module, mesh: DeviceMesh) -> None:
    """Shard `encoder`, a transformers model, in place over `mesh`, of one dimension.

    As :func:`cachedit.parallel.tensor.shard_transformer`: every rank holds the same weights before and its share of
    them after, and inputs and outputs are whole on every rank. Weights that were tied stay tied. Of a model that sees
    images, the vision tower stays whole.

    Raises:
        ValueError: See :func:`check_text_encoder`; the mesh has more than one dimension. Nothing has changed then.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh}")
    check_text_encoder(encoder, mesh.size())
    if mesh.size() == 1:
        return
    plan, counts, tied = _plan_of(encoder), _counts(encoder), _tied(encoder)
    for name, style in plan.items():
        parallelize_module(encoder.get_submodule(name), mesh, STYLES[style](), src_data_rank=None)
    for names in tied:
        _tie(encoder, names)
    divide_counts(counts, mesh.size())


def _plan_of(encoder: Any) -> dict[str, str]:
    """Names of modules, and their style; without those that stay whole."""
    rows = [ENCODER_PLANS[cls.__name__] for cls in type(encoder).__mro__ if cls.__name__ in ENCODER_PLANS]
    patterns: dict[str, str] = rows[0] if rows else getattr(encoder, "_tp_plan", None) or {}
    if "colwise" not in patterns.values():  # of a plan for the output head alone, nothing is worth it
        raise ValueError(
            f"encoder: neither transformers nor cachedit has a tensor-parallel plan for {type(encoder).__name__}"
        )
    unknown = sorted(set(patterns.values()) - STYLES.keys() - WHOLE)
    if unknown:
        raise ValueError(f"encoder: the plan of {type(encoder).__name__} has styles that are not known here: {unknown}")
    modules = [name for name, _ in encoder.named_modules()]
    return {
        name: style
        for pattern, style in patterns.items()
        if style not in WHOLE
        for name in modules
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name)
    }


def _check_width(encoder: nn.Module, name: str, width: int, size: int) -> None:
    """`width` is what is split: of a projection of queries, keys or values, into heads."""
    owner, unit = encoder.get_submodule(name.rpartition(".")[0]), ""
    if isinstance(head := getattr(owner, "head_dim", None), int):
        width, unit = width // head, f" heads of {head}"
    if width % size:
        raise ValueError(f"{name}: expected a multiple of {size} ranks, got {width}{unit}")


def _counts(encoder: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules, and their attributes that become a rank's share."""
    owners = [module for module in encoder.modules() if type(module).__name__ in ENCODER_SHARES]
    return [(owner, attribute) for owner in owners for attribute in ENCODER_SHARES[type(owner).__name__]]


def _tied(encoder: nn.Module) -> list[list[str]]:
    """Names of parameters that are one."""
    names = defaultdict(list)
    for name, parameter in encoder.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(encoder: nn.Module, names: list[str]) -> None:
    first = encoder.get_parameter(names[0])
    for name in names[1:]:
        owner, _, attribute = name.rpartition(".")
        other = encoder.get_parameter(name)
        if isinstance(first, DTensor) and isinstance(other, DTensor) and first.placements == other.placements:
            setattr(encoder.get_submodule(owner), attribute, first)
