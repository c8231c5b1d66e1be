"""Tensor parallelism: each rank holds a share of the heads and of the feed-forward widths, and adds up what comes out.

Linear layers are split in pairs (Megatron-LM, arXiv 1909.08053): the first by its outputs, the second by its inputs, so
that a pair costs one all-reduce. diffusers' plans and its machinery do this where a class has a plan; `tensor_plans.py`
has rows for other classes, which are put into the same terms here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._pytree import tree_map_only

from .tensor_plans import KINDS, PLANS, SHARES, TensorPlan

__all__ = ["check_tensor_parallel", "shard_transformer"]


class Sharding(NamedTuple):
    """What happens to one transformer.

    Args:
        linears: Linear layers, by pattern, and their style: a plan in diffusers' format.
        norms: Norms of queries and keys across all heads.
        attention: Attention modules that reckon with their number of heads.
        counts: Modules, and their attributes that become a rank's share.
        rotary: Arguments of attention that differ by head: see :class:`TensorPlan`.
    """

    linears: dict[str, Any]
    norms: list[str]
    attention: list[nn.Module]
    counts: list[tuple[nn.Module, str]]
    rotary: dict[str, dict[int, int]]


def check_tensor_parallel(transformer: nn.Module, size: int) -> None:
    """Whether `transformer` can be sharded over `size` ranks. Changes nothing.

    Raises:
        ValueError: No plan for this class; heads or widths that don't divide; weights that are quantised, offloaded,
            sharded already, or have adapters (LoRA, IP-Adapter) or fused projections.
    """
    if size < 1:
        raise ValueError(f"size: expected 1 or more ranks, got {size}")
    _check_state(transformer, size)
    sharding = _sharding(transformer)
    _check_weights(transformer, size, sharding)
    check_counts(sharding.counts, size)


def shard_transformer(transformer: nn.Module, mesh: DeviceMesh) -> None:
    """Shard `transformer` in place over `mesh`, of one dimension. Every rank must hold the same weights beforehand.

    Weights become DTensors, of which a rank holds its share, on the mesh's type of device; each rank cuts its share out
    of its own copy, nothing is sent. Inputs, outputs and the streams between blocks stay whole on every rank, so a
    cache on top decides alike everywhere. What is small (embedders, modulation, norms) stays whole, too.

    A pair of linear layers costs one all-reduce per forward; where queries and keys are normalised across all heads
    (Wan, LTX), each such norm costs one of a number per token. There is no way back but to load the weights again.

    Raises:
        ValueError: See :func:`check_tensor_parallel`; the mesh has more than one dimension. Nothing has changed then.
    """
    from diffusers.hooks.tensor_parallel import _resolve_tp_plan, _styles

    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh}")
    check_tensor_parallel(transformer, mesh.size())
    if mesh.size() == 1:
        return
    sharding = _sharding(transformer)
    # Not diffusers' apply_tensor_parallel: it refuses CPUs, and sends every weight from rank 0.
    for block, plan in _resolve_tp_plan(transformer, sharding.linears):
        parallelize_module(block, mesh, _styles(plan), src_data_rank=None)
    for name in sharding.norms:
        whole: Any = transformer.get_submodule(name)
        transformer.set_submodule(name, ShardedRMSNorm(whole, mesh))
    divide_counts(sharding.counts, mesh.size())
    if sharding.rotary:
        for module in sharding.attention:
            module.register_forward_pre_hook(_RotaryShare(sharding.rotary, mesh), with_kwargs=True)
    transformer._parallel_config = _config(mesh)


class ShardedRMSNorm(nn.Module):
    """RMSNorm over a width of which each rank has an equal share: (..., width / ranks) to the same shape.

    In float32, with one rounding to the input's dtype, as `nn.RMSNorm` does it; sums of squares, one per row, are added
    up over the ranks.
    """

    weight: nn.Parameter | None

    def __init__(self, whole: nn.RMSNorm, mesh: DeviceMesh):
        super().__init__()
        self.width, self.eps, self.mesh = whole.normalized_shape[0], whole.eps, mesh
        self.register_parameter("weight", None)
        if whole.weight is not None:
            share = distribute_tensor(whole.weight.data, mesh, [Shard(0)], src_data_rank=None)
            self.weight = nn.Parameter(share, requires_grad=whole.weight.requires_grad)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        squares = all_reduce(wide.square().sum(-1, keepdim=True), "sum", (self.mesh, 0))
        eps = torch.finfo(hidden.dtype).eps if self.eps is None else self.eps
        wide = wide * torch.rsqrt(squares / self.width + eps)
        if isinstance(self.weight, DTensor):
            wide = wide * self.weight.to_local().float()
        return wide.to(hidden.dtype)


class _RotaryShare:
    """A forward pre-hook of attention: of arguments that differ by head, this rank's heads."""

    def __init__(self, rotary: dict[str, dict[int, int]], mesh: DeviceMesh):
        self.rotary, self.size, self.rank = rotary, mesh.size(), mesh.get_local_rank()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for name in self.rotary.keys() & kwargs.keys():
            kwargs[name] = tree_map_only(Tensor, partial(self._share, self.rotary[name]), kwargs[name])
        return args, kwargs

    def _share(self, dimensions: dict[int, int], tensor: Tensor) -> Tensor:
        return tensor.chunk(self.size, dimensions[tensor.ndim])[self.rank]


def _config(mesh: DeviceMesh) -> Any:
    """What diffusers goes by when it refuses to load adapters into a sharded model, or to shard it again."""
    from diffusers import ParallelConfig, TensorParallelConfig

    config: Any = TensorParallelConfig(tp_degree=mesh.size(), mesh=mesh)
    device = torch.device(mesh.device_type)
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh)
    return ParallelConfig(tensor_parallel_config=config)


def _sharding(transformer: nn.Module) -> Sharding:
    """By diffusers' own plan or a row of ours."""
    own = getattr(transformer, "_tp_plan", None)
    if own is not None:  # with processors that leave the number of heads to the tensors' widths
        return Sharding(dict(own), [], [], [], {})
    plan = _plan_of(transformer)
    sharding = Sharding({}, [], [], [], plan.rotary)
    for pattern, kind in plan.modules.items():
        for name, module in _matches(transformer, pattern):
            _add(sharding, name, module, kind)
    return sharding


def _plan_of(transformer: nn.Module) -> TensorPlan:
    for cls in type(transformer).__mro__:
        if cls.__name__ in PLANS:
            return PLANS[cls.__name__]
    raise ValueError(
        f"transformer: {type(transformer).__name__} has no tensor-parallel plan; those that have are diffusers' FLUX, "
        f"FLUX.2 and Qwen-Image classes, {', '.join(sorted(PLANS))}"
    )


def _matches(transformer: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules of that name, with every index in place of the asterisk; none where blocks lack such a module."""
    container, _, suffix = pattern.partition(".*")
    for index, _ in transformer.get_submodule(container).named_children():
        name = f"{container}.{index}{suffix}"
        module = _child(transformer, name)
        if module is not None:
            yield name, module


def _child(module: nn.Module, name: str) -> nn.Module | None:
    for atom in name.split("."):
        child = getattr(module, atom, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def _add(sharding: Sharding, name: str, module: nn.Module, kind: str) -> None:
    """Put one module into diffusers' terms."""
    by_output, by_input = KINDS[kind]
    outputs: dict[str, Any] = {part: linear for part in by_output if (linear := _child(module, part)) is not None}
    inputs: dict[str, Any] = {part: linear for part in by_input if (linear := _child(module, part)) is not None}
    styles: dict[str, Any] = dict.fromkeys(outputs, "colwise") | dict.fromkeys(inputs, "rowwise")
    if kind == "single":
        styles |= _packed(outputs, inputs, outputs["attn.to_q"].out_features)
    elif kind == "feed_forward":
        styles |= _packed(outputs, inputs, 0)
    else:
        sharding.attention.append(module)
        sharding.norms.extend(_wide_norms(name, module, next(iter(outputs.values())).out_features))
    if kind != "single":
        _check_covered(name, module, [*outputs.values(), *inputs.values()])
    sharding.linears.update({f"{name}.{part}": style for part, style in styles.items()})
    for owner in (module, _child(module, "attn")):
        sharding.counts.extend((owner, attribute) for attribute in SHARES if owner and hasattr(owner, attribute))


def _packed(outputs: dict[str, Any], inputs: dict[str, Any], attention: int) -> dict[str, Any]:
    """Linear layers that hold several projections side by side, each of which is split by itself.

    `attention` is the width of attention's output where the last layer takes that, too.
    """
    from diffusers.hooks.tensor_parallel import PackedColwiseParallel, PackedRowwiseParallel

    ((last, joined),) = inputs.items()
    hidden = joined.in_features - attention
    styles: dict[str, Any] = {last: PackedRowwiseParallel([attention, hidden])} if attention else {}
    gated = [
        part for part, linear in outputs.items() if not part.startswith("attn") and linear.out_features == 2 * hidden
    ]
    return styles | {part: PackedColwiseParallel([1, 1]) for part in gated}


def _wide_norms(name: str, attention: nn.Module, width: int) -> Iterator[str]:
    """Norms of queries and keys across all heads, by full name."""
    for part, norm in attention.named_children():
        if isinstance(norm, nn.RMSNorm):
            if norm.normalized_shape == (width,):
                yield f"{name}.{part}"
        elif isinstance(weight := getattr(norm, "weight", None), Tensor) and weight.shape == (width,):
            raise ValueError(f"{name}.{part}: a norm across all heads must be an nn.RMSNorm, got {type(norm).__name__}")


def _check_covered(name: str, module: nn.Module, known: Iterable[nn.Module]) -> None:
    for part, linear in module.named_modules():
        if isinstance(linear, nn.Linear) and linear not in known:
            raise ValueError(
                f"{name}.{part}: a linear layer that the tensor-parallel plan of its class doesn't know; fused "
                "projections and IP-Adapters can't be sharded"
            )


def _check_state(transformer: nn.Module, size: int) -> None:
    """That the modules are the model's own, as they were loaded."""
    own = getattr(transformer, "_tp_plan", None)
    heads = None if own is None else getattr(transformer.config, "num_attention_heads", None)
    check_modules(transformer, own or {}, size, heads)
    for name, module in transformer.named_modules():
        if getattr(module, "fused_projections", False):
            raise ValueError(f"{name}: fused projections can't be sharded, call unfuse_qkv_projections() before")
        processor = getattr(module, "processor", None)
        if isinstance(processor, nn.Module) and next(processor.parameters(), None) is not None:
            raise ValueError(f"{name}: its processor {type(processor).__name__} has weights (IP-Adapter): remove them")


def check_modules(model: nn.Module, plan: dict[str, Any], size: int, heads: int | None = None) -> None:
    """diffusers' own refusals, which go for transformers' models as well: quantised, offloaded, adapters, heads."""
    from diffusers import TensorParallelConfig
    from diffusers.hooks.tensor_parallel import _check_tp_supported

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"this {type(model).__name__} is sharded already")
    _check_tp_supported(type(model).__name__, plan, heads, TensorParallelConfig(tp_degree=size), model=model)


def check_weight(name: str, weight: Tensor) -> None:
    """That a parameter can be cut: no quantised ones."""
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f"{name}: expected a plain floating-point parameter, got a {type(weight).__name__} of {weight.dtype}; "
            "quantised weights can't be sharded"
        )


def _check_weights(transformer: nn.Module, size: int, sharding: Sharding) -> None:
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    for name in resolve_tp_shard_specs(transformer, sharding.linears, size):
        check_weight(name, transformer.get_parameter(name))


def check_counts(counts: Iterable[tuple[nn.Module, str]], size: int) -> None:
    """That attributes of modules can become a rank's share."""
    for module, attribute in counts:
        if getattr(module, attribute) % size:
            raise ValueError(
                f"{attribute} of {type(module).__name__}: expected a multiple of {size} ranks, "
                f"got {getattr(module, attribute)}"
            )


def divide_counts(counts: Iterable[tuple[nn.Module, str]], size: int) -> None:
    """Make them one."""
    for module, attribute in counts:
        setattr(module, attribute, getattr(module, attribute) // size)
