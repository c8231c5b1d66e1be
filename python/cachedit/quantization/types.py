"""The table of quantization types: how torchao is asked for each, and what each needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["QUANT_TYPES", "QuantType", "find_type"]


class QuantType(NamedTuple):
    """One way to quantize a linear layer.

    Args:
        make: Takes the module ``torchao.quantization`` and returns its configuration. Global settings of the compiler,
            which torchao would change, are left alone.
        capability: The least CUDA compute capability. None: any device, the CPU included.
        dtypes: Of weights that it takes; empty for all floating-point ones.
        multiple: What the numbers of outputs and inputs of a layer must be multiples of.
        fallback: Type for layers whose sizes do not fit.
    """

    make: Callable[[Any], Any]
    capability: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    multiple: tuple[int, int] = (1, 1)
    fallback: str | None = None

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a layer of this size can be quantized so."""
        return outputs % self.multiple[0] == 0 and inputs % self.multiple[1] == 0


INT4_GROUP = 32  # inputs that share a scale


def _float8(granularity: str) -> Callable[[Any], Any]:
    return lambda q: q.Float8DynamicActivationFloat8WeightConfig(
        granularity=getattr(q, granularity)(), set_inductor_config=False
    )


def _float8_per_block(q: Any) -> Any:
    blocks = [q.PerBlock([1, 128]), q.PerBlock([128, 128])]  # of activations and of weights
    return q.Float8DynamicActivationFloat8WeightConfig(granularity=blocks, set_inductor_config=False)


def _int8(granularity: str) -> Callable[[Any], Any]:
    return lambda q: q.Int8DynamicActivationInt8WeightConfig(
        granularity=getattr(q, granularity)(), set_inductor_config=False
    )


def _int4(q: Any) -> Any:
    return q.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=q.PerGroup(INT4_GROUP),
    )


def _int4_weight_only(q: Any) -> Any:
    # The packing of torch's own kernel; torchao's default packing needs one more package.
    return q.Int4WeightOnlyConfig(
        group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


_BF16 = (torch.bfloat16,)
QUANT_TYPES: dict[str, QuantType] = {
    # float8 weights and activations, whose scales are computed at each call
    "float8_per_row": QuantType(_float8("PerRow"), (8, 9), _BF16, (16, 16), "float8_per_tensor"),
    "float8_per_tensor": QuantType(_float8("PerTensor"), (8, 9), multiple=(16, 16)),
    "float8_per_block": QuantType(_float8_per_block, (8, 9), _BF16, (128, 128), "float8_per_tensor"),
    "float8_weight_only": QuantType(lambda q: q.Float8WeightOnlyConfig(set_inductor_config=False)),
    # int8 weights and activations, likewise
    "int8_per_row": QuantType(_int8("PerRow")),
    "int8_per_tensor": QuantType(_int8("PerTensor")),
    "int8_weight_only": QuantType(lambda q: q.Int8WeightOnlyConfig(set_inductor_config=False)),
    # int4 weights in groups; int8 activations, or as they are
    "int4": QuantType(_int4, multiple=(1, INT4_GROUP)),
    "int4_weight_only": QuantType(_int4_weight_only, (8, 0), _BF16, (8, INT4_GROUP)),
}

# Other names: shorter ones, and those of older versions of cache_dit.
_ALIASES = {
    **{name: "float8_per_row" for name in ("float8", "fp8_w8a8_dq")},
    **{name: "float8_per_block" for name in ("float8_blockwise", "fp8_blockwise")},
    **{name: "float8_weight_only" for name in ("float8_wo", "fp8_w8a16_wo")},
    **{name: "int8_per_row" for name in ("int8", "int8_w8a8_dq")},
    **{name: "int8_weight_only" for name in ("int8_wo", "int8_w8a16_wo")},
    "int4_w4a8_dq": "int4",
    **{name: "int4_weight_only" for name in ("int4_wo", "int4_w4a16_wo")},
}
_LATER = ("svdq", "nvfp4", "int4_w4a4")  # names of cache_dit that begin so


def find_type(name: str, field: str = "quant_type") -> str:
    """Return the name in the table that a name stands for; upper and lower case are the same.

    Raises:
        NotImplementedError: For a type of cache_dit that this version does not have.
        ValueError, TypeError: For any other unknown name; for what is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"{field} must be a string, got {name!r}")
    found = _ALIASES.get(name.lower(), name.lower())
    if found.startswith(_LATER):
        raise NotImplementedError(
            f"{field} {name!r} is not available in this version of cachedit yet: of 4 bits there are int4 and "
            "int4_weight_only; SVDQuant transformers that Nunchaku has loaded can be cached (docs/quantization.md)"
        )
    if found not in QUANT_TYPES:
        raise ValueError(f"{field} must be one of {', '.join([*QUANT_TYPES, *_ALIASES])}, got {name!r}")
    return found
