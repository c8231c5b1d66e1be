"""Picks the linear layers that are to be quantized, tries each kind of them on a copy, and quantizes them in place."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..attention import transformers_of
from ..models.table import find_entry
from .config import QuantizeConfig
from .types import QUANT_TYPES, QuantType, find_type

__all__ = ["Quantization", "prepare_quantization", "quantize"]

logger = logging.getLogger(__name__)

Target = TypeVar("Target")
_TRIAL_ROWS = 32  # tokens of a trial; some integer kernels need more than 16


class _Layer(NamedTuple):
    name: str
    linear: nn.Linear
    quant_type: str


class Quantization(NamedTuple):
    """What has been checked, and is to be quantized."""

    config: QuantizeConfig
    layers: list[_Layer]

    def apply(self) -> None:
        """Quantize the layers, in place."""
        for _, linear, quant_type in self.layers:
            _quantize_layer(linear, quant_type)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {"quantize_config": [(layer.name, layer.quant_type) for layer in self.layers]}


def quantize(module: Target, quantize_config: QuantizeConfig | None = None, **kwargs: Any) -> Target:
    """Quantize linear layers in place, by default those of a transformer's repeated blocks.

    Quantized layers take and return the dtypes that they did before. There is no way back but loading the weights
    again. Layers that are quantized already are left as they are, and so are LoRA adapters, whose base layers are not.

    Args:
        module: A transformer or any other module (or a pipeline, or an adapter: its transformers), on the device that
            it will run on.
        quantize_config: What to quantize, and how.
        **kwargs: The fields of :class:`QuantizeConfig`, instead of one.

    Returns:
        What was given.

    Raises:
        ImportError: Without torchao (``pip install "cachedit-kernels[quantization]"``).
        ValueError: For a field, a device, weights or a model that do not fit. Nothing is changed then.
        TypeError: For an unknown field, or one of another type.
        NotImplementedError: For a quantization type of cache_dit that this version does not have.

    Example:
        >>> cachedit.quantize(pipe.transformer, quant_type="float8_weight_only", exclude_layers=["proj_out"])
    """
    if quantize_config is not None and kwargs:
        raise TypeError(f"quantize takes quantize_config or single fields, not both; got {', '.join(kwargs)} as well")
    prepare_quantization(module, QuantizeConfig(**kwargs) if quantize_config is None else quantize_config).apply()
    return module


def prepare_quantization(target: Any, config: QuantizeConfig) -> Quantization:
    """Check everything that :func:`quantize` needs, and pick the layers; nothing is changed."""
    if not isinstance(config, QuantizeConfig):
        raise TypeError(f"quantize_config must be a QuantizeConfig, got {type(config).__name__}")
    config.validate()
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"quantization needs torchao, which cannot be imported ({error}): "
            'pip install "cachedit-kernels[quantization]"'
        ) from error
    if config.precision_plan and not config.regional_quantize:
        logger.warning("precision_plan is for regional_quantize=True, and is not looked at")
    layers = [
        layer for module, component_config in _components(target, config) for layer in _select(module, component_config)
    ]
    for kind, layer in {_kind(layer): layer for layer in reversed(layers)}.items():  # the first of each kind
        _try(layer, kind)
    return Quantization(config, layers)


def _components(target: Any, config: QuantizeConfig) -> Iterator[tuple[nn.Module, QuantizeConfig]]:
    if config.components_to_quantize is None:
        transformers = transformers_of(target)
        if not transformers:
            raise TypeError(
                f"module must be a torch.nn.Module or a pipeline with a transformer, got {type(target).__name__}"
            )
        yield from ((transformer, config) for transformer in transformers)
        return
    pipe = getattr(target, "pipe", None) or target
    for name in config.components_to_quantize:
        module = pipe if isinstance(pipe, nn.Module) and name == "transformer" else getattr(pipe, name, None)
        if not isinstance(module, nn.Module):
            raise ValueError(f"components_to_quantize: {type(pipe).__name__} has no module {name!r}")
        yield module, config.for_component(name)


def _select(module: nn.Module, config: QuantizeConfig) -> list[_Layer]:
    """The layers of one module with their types; what is left out is logged."""
    layers, left, quantized = [], Counter[str](), 0
    for name, linear in _linear_layers(module, config):
        if type(linear.weight) is not nn.Parameter:  # torchao's tensors, shards, packed weights of other libraries
            quantized += 1
            continue
        quant_type, reason = _choose(name, linear, config)
        if quant_type is None:
            left[reason] += 1
        else:
            layers.append(_Layer(name, linear, quant_type))
        if config.verbose:
            logger.info("%s: %s", name, quant_type or f"left as it is: {reason}")
    what = type(module).__name__
    if not layers and not quantized:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.items()) or "there are none"
        raise ValueError(f"quantize_config: no linear layer of {what} is left to quantize: {reasons}")
    if quantized:
        logger.warning("%s: %d linear layers are quantized or cut already, and stay as they are", what, quantized)
    counts = Counter(layer.quant_type for layer in layers)
    logger.info("quantization of %s: %s; left as they are: %s", what, dict(counts), dict(left))
    return layers


def _linear_layers(module: nn.Module, config: QuantizeConfig) -> Iterator[tuple[str, nn.Linear]]:
    regions = _repeated_blocks(module, config) if config.regional_quantize else [("", module)]
    seen: set[int] = set()
    for prefix, region in regions:
        for name, layer in region.named_modules(prefix=prefix):
            if isinstance(layer, nn.Linear) and id(layer) not in seen:
                seen.add(id(layer))
                yield name, layer


def _repeated_blocks(module: nn.Module, config: QuantizeConfig) -> list[tuple[str, nn.Module]]:
    entry = find_entry(module)
    if entry is not None and not config.repeated_blocks:
        lists = [item.name for section in entry.sections for item in section]
        return [(name, module.get_submodule(name)) for name in lists]
    classes = config.repeated_blocks or getattr(module, "_repeated_blocks", None)
    if not classes:
        logger.info("%s has no known blocks: it is quantized whole", type(module).__name__)
        return [("", module)]
    blocks = [(name, each) for name, each in module.named_modules() if type(each).__name__ in classes]
    if not blocks:
        raise ValueError(f"repeated_blocks: {type(module).__name__} has no modules of the classes {', '.join(classes)}")
    return blocks


def _choose(name: str, linear: nn.Linear, config: QuantizeConfig) -> tuple[str | None, str]:
    """The type of a layer, or None and why it is left as it is."""
    if any(part.startswith("lora_") for part in name.split(".")):  # PEFT's lora_A and lora_B, others' lora_up
        return None, "of LoRA adapters"
    if config.filter_fn is not None:
        if not config.filter_fn(linear, name):
            return None, "left out by filter_fn"
    elif any(part in name for part in config.exclude_layers or ()):
        return None, "left out by exclude_layers"
    plan = (config.precision_plan or {}) if config.regional_quantize else {}
    quant_type = find_type(next((value for part, value in plan.items() if part in name), config.quant_type))
    row, sizes = QUANT_TYPES[quant_type], (linear.out_features, linear.in_features)
    if row.fits(*sizes):
        return quant_type, ""
    if config.per_tensor_fallback and row.fallback is not None and QUANT_TYPES[row.fallback].fits(*sizes):
        return row.fallback, ""
    return None, f"of sizes that {quant_type} cannot take"


def _kind(layer: _Layer) -> tuple[Any, ...]:
    """Equal for layers of which one trial is enough."""
    weight = layer.linear.weight
    return layer.quant_type, weight.device, weight.dtype, tuple(weight.shape), layer.linear.bias is None


def _try(layer: _Layer, kind: tuple[Any, ...]) -> None:
    """Quantize a copy of a layer and run it, so that what cannot work is known before anything is changed."""
    name, linear, quant_type = layer
    _check_needs(f"quant_type {quant_type!r}", name, linear.weight, QUANT_TYPES[quant_type])
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    copy.weight, copy.bias = linear.weight, linear.bias
    try:
        _quantize_layer(copy, quant_type)
        with torch.no_grad():
            copy(torch.ones(_TRIAL_ROWS, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device))
    except Exception as error:  # torchao asserts, and kernels raise what they like
        raise ValueError(f"quant_type {quant_type!r} cannot be used here: {name}, {kind[1:4]}: {error}") from error


def _check_needs(what: str, name: str, weight: torch.Tensor, row: QuantType) -> None:
    if weight.device.type == "meta":
        raise ValueError(f"{what}: the weight of {name} is on the meta device: quantize before offloading")
    if row.capability is not None:
        _check_capability(what, name, weight.device, row.capability)
    if row.dtypes and weight.dtype not in row.dtypes:
        raise ValueError(f"{what} needs weights of {row.dtypes[0]}, but that of {name} is of {weight.dtype}")


def _check_capability(what: str, name: str, device: torch.device, needed: tuple[int, int]) -> None:
    needs = f"{what} needs a GPU of compute capability {needed[0]}.{needed[1]} or higher"
    if device.type != "cuda":
        raise ValueError(f"{needs}, but {name} is on {device}")
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.cuda is not None and (major, minor) < needed:  # ROCm counts otherwise: the trial tells
        raise ValueError(f"{needs}, but {device} has {major}.{minor}")


def _quantize_layer(linear: nn.Linear, quant_type: str) -> None:
    from torchao import quantization

    quantization.quantize_(linear, QUANT_TYPES[quant_type].make(quantization))
