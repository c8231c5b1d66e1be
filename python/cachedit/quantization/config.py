"""What a user says about quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from .types import find_type

__all__ = ["QuantizeBackend", "QuantizeConfig"]

_BACKENDS = ("auto", "torchao", "ao")
_COMPONENT_FIELDS = ("quant_type", "exclude_layers", "regional_quantize", "repeated_blocks", "filter_fn",
                     "per_tensor_fallback", "precision_plan", "verbose")  # fmt: skip


class QuantizeBackend(Enum):
    """As ``cache_dit`` calls what quantizes; here it is always torchao."""

    AUTO = "AUTO"
    TORCHAO = "TORCHAO"
    CACHE_DIT = "CACHE_DIT"
    NONE = "NONE"


@dataclasses.dataclass
class QuantizeConfig:
    """Which linear layers are quantized, and how.

    Args:
        backend: ``"torchao"`` (or ``"ao"``, or a :class:`QuantizeBackend`); AUTO is the same.
        quant_type: ``float8_per_row`` (``float8``), ``float8_per_tensor``, ``float8_per_block``
            (``float8_blockwise``), ``float8_weight_only``, ``int8_per_row`` (``int8``), ``int8_per_tensor``,
            ``int8_weight_only``, ``int4``, ``int4_weight_only``; docs/quantization.md says what each needs.
        exclude_layers: Layers with any of these in their dotted name stay as they are; LoRA adapters always do.
        regional_quantize: Quantize only the repeated blocks: ``repeated_blocks``, or else the block lists of the model
            table, or else what diffusers names; a model without any of them whole.
        repeated_blocks: Class names of the blocks.
        filter_fn: Called as ``filter_fn(layer, name)``, says by itself which linear layers are quantized;
            ``exclude_layers`` is not looked at then.
        components_to_quantize: Names of a pipeline's components, or for each name the fields that differ (such as
            ``{"text_encoder": {"quant_type": "int8_weight_only"}}``). Default: its transformers.
        per_tensor_fallback: Layers whose sizes per-row or blockwise float8 cannot take become ``float8_per_tensor``;
            otherwise they stay as they are.
        precision_plan: Other types by parts of layer names, the first that matches; with ``regional_quantize`` only.
        calibrate_fn, serialize_to, svdq_kwargs: For SVDQuant, which this version does not have: must be None.
        verbose: Log every layer.

    Raises:
        ValueError, TypeError, NotImplementedError: From ``validate``, which whatever takes a configuration calls.
    """

    backend: str | QuantizeBackend = QuantizeBackend.AUTO
    quant_type: str = "float8_per_row"
    exclude_layers: list[str] | None = dataclasses.field(
        default_factory=lambda: ["embedder", "embed", "modulation", "mod"]
    )
    regional_quantize: bool = True
    repeated_blocks: list[str] = dataclasses.field(default_factory=list)
    filter_fn: Callable[[Any, str], bool] | None = None
    components_to_quantize: list[str] | dict[str, dict[str, Any]] | None = None
    per_tensor_fallback: bool = True
    precision_plan: dict[str, str] | None = None
    calibrate_fn: Callable[..., Any] | None = None
    serialize_to: str | None = None
    svdq_kwargs: dict[str, Any] | None = None
    verbose: bool = False

    def validate(self) -> None:
        """Check every field by itself, without regard to a model or to this machine."""
        find_type(self.quant_type)
        backend = str(getattr(self.backend, "value", self.backend)).lower()
        if backend in ("cache_dit", "cache-dit", "cachedit"):
            raise NotImplementedError(
                f"backend {self.backend!r} is not available in this version of cachedit yet, as it is for SVDQuant: "
                f"there is torchao ({', '.join(_BACKENDS)})"
            )
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {self.backend!r}")
        for name in ("calibrate_fn", "serialize_to", "svdq_kwargs"):
            if getattr(self, name) is not None:
                raise NotImplementedError(f"{name} is for SVDQuant, which is not available in this version yet")
        for name in ("regional_quantize", "per_tensor_fallback", "verbose"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("exclude_layers", "repeated_blocks"):
            _check_names(name, getattr(self, name))
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise TypeError(f"filter_fn must be a function of a layer and its name, got {self.filter_fn!r}")
        plan = self.precision_plan
        if plan is not None and not (isinstance(plan, Mapping) and all(isinstance(part, str) for part in plan)):
            raise TypeError(f"precision_plan must map parts of layer names to types, got {self.precision_plan!r}")
        for part, quant_type in (self.precision_plan or {}).items():
            find_type(quant_type, f"precision_plan[{part!r}]")
        components = self.components_to_quantize
        _check_names("components_to_quantize", list(components) if isinstance(components, Mapping) else components)
        if components is not None and not components:
            raise ValueError("components_to_quantize names no component: None stands for the transformers")
        for component, fields in components.items() if isinstance(components, Mapping) else ():
            if not isinstance(fields, Mapping):
                raise TypeError(f"components_to_quantize: {component} must be a dictionary of fields, got {fields!r}")
            for key in fields:
                if key not in _COMPONENT_FIELDS:
                    raise ValueError(
                        f"components_to_quantize: {component}: {key} is none of {', '.join(_COMPONENT_FIELDS)}"
                    )
            self.for_component(component).validate()

    def for_component(self, name: str) -> QuantizeConfig:
        """The configuration of one component of a pipeline."""
        plan = self.components_to_quantize
        fields = plan[name] if isinstance(plan, Mapping) else {}
        return dataclasses.replace(self, components_to_quantize=None, **fields)

    def component_quant_types(self) -> dict[str, str]:
        """The quantization type of each component."""
        components = self.components_to_quantize or ["transformer"]
        return {name: find_type(self.for_component(name).quant_type) for name in components}

    def as_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def update(self, **changes: Any) -> QuantizeConfig:
        """Set fields in place; None changes nothing. Unknown names are a TypeError."""
        names = self.as_dict()
        for name, value in changes.items():
            if name not in names:
                raise TypeError(f"QuantizeConfig has no field {name!r}")
            if value is not None:
                setattr(self, name, value)
        return self

    def strify(self) -> str:
        """A short tag: the type, or ``<component:type>`` for each where they are given one by one."""
        if not isinstance(self.components_to_quantize, Mapping):
            return find_type(self.quant_type)
        return "".join(f"<{name}:{quant_type}>" for name, quant_type in self.component_quant_types().items())


def _check_names(field: str, names: Any) -> None:
    if names is not None and (not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names)):
        raise TypeError(f"{field} must be a list of names, got {names!r}")
