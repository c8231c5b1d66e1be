"""Configuration files: YAML, JSON or a dictionary in, configuration objects out (docs/config-files.md).

The format is that of ``cache_dit``; unknown keys are errors here, so that a typo is not a cache that does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import logging
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

from .calibrator import CalibratorConfig, DMDCalibratorConfig, FoCaCalibratorConfig, TaylorSeerCalibratorConfig
from .config import BasicCacheConfig, DBCacheConfig, DBPruneConfig
from .document import Document, read_document
from .mask import MASK_POLICIES, steps_mask
from .parallel import ParallelismConfig
from .quantization import QuantizeConfig
from .teacache import TeaCacheConfig

__all__ = [
    "load_attn_backend_config",
    "load_cache_config",
    "load_configs",
    "load_options",
    "load_parallelism_config",
    "load_quantize_config",
]

logger = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", BasicCacheConfig, CalibratorConfig)
Loaded = tuple[BasicCacheConfig | None, CalibratorConfig | None]


class _Calibrator(NamedTuple):
    config: type[CalibratorConfig]
    keys: dict[str, str]  # key in the file: field of the configuration
    encoder: bool  # whether files forecast the encoder stream where they do not say


_CACHE_TYPES: dict[str, type[BasicCacheConfig]] = {
    "DBCache": DBCacheConfig,
    "DBPrune": DBPruneConfig,
    "TeaCache": TeaCacheConfig,
}
_SHARED_KEYS = {"calibrator_cache_type": "calibrator_cache_type"}
_TAYLORSEER_KEYS = {
    "enable_encoder_taylorseer": "enable_encoder_calibrator",
    "taylorseer_cache_type": "calibrator_cache_type",
    "taylorseer_order": "taylorseer_order",
}
_DMD_KEYS = {key: key for key in ("dmd_history", "dmd_rank", "dmd_ridge", "dmd_svd_precision")}
_DMD_KEYS["enable_encoder_dmd"] = "enable_encoder_calibrator"
_FOCA_KEYS = {"enable_encoder_foca": "enable_encoder_calibrator"}
_CALIBRATORS: dict[str, _Calibrator] = {
    "enable_taylorseer": _Calibrator(TaylorSeerCalibratorConfig, _SHARED_KEYS | _TAYLORSEER_KEYS, False),
    "enable_dmd": _Calibrator(DMDCalibratorConfig, _SHARED_KEYS | _DMD_KEYS, True),
    "enable_foca": _Calibrator(FoCaCalibratorConfig, _SHARED_KEYS | _FOCA_KEYS, False),
}

_SIZES = {"ulysses": "ulysses_size", "ring": "ring_size", "tp": "tp_size"}  # short name: name
_RAY_KEYS = (  # of a launcher that is not here: without effect, as long as use_ray is false
    *("ray_num_workers", "ray_address", "ray_runtime_env", "ray_init_kwargs", "ray_worker_options", "ray_master_port"),
    *("ray_auto_shutdown", "ray_transfer_backend", "ray_transfer_custom_obj", "ray_transfer_fn", "ray_use_flashpack"),
    "ray_use_compile",
)
_PARALLELISM_FIELDS = [f.name for f in dataclasses.fields(ParallelismConfig) if f.name != "process_group"]
_PARALLELISM_KEYS = (*_SIZES, *_PARALLELISM_FIELDS, *_RAY_KEYS)
_MISSPELT = {"enable_sperate_cfg": "enable_separate_cfg"}  # by the guides of SGLang and cache_dit
_QUANTIZE_KEYS = [f.name for f in dataclasses.fields(QuantizeConfig)]
_SECTIONS = ("cache_config", "parallelism_config", "attention_backend", "quantize_config")
_TYPE_NAMES = {bool: "true or false", float: "a number", str: "a string", Sequence: "a list", Mapping: "a mapping"}


@overload
def load_configs(path_or_dict: Document, return_dict: Literal[True] = True, **kwargs: Any) -> dict[str, Any]: ...
@overload
def load_configs(path_or_dict: Document, return_dict: Literal[False], **kwargs: Any) -> tuple[Any, ...]: ...
def load_configs(path_or_dict: Document, return_dict: bool = True, **kwargs: Any) -> dict[str, Any] | tuple[Any, ...]:
    """Load every section of a configuration file.

    Args:
        path_or_dict: A YAML file, a JSON file (by the suffix ``.json``), or a dictionary of the same shape.
        return_dict: Return a dictionary, else a tuple in the same order.
        **kwargs: ``reset=True`` leaves fields that are not given at None, for ``refresh_context``.
            ``auto_parallel_size`` is accepted and has no effect: a size of ``"auto"`` is worked out when parallelism
            is enabled.

    Returns:
        ``cache_config``, ``calibrator_config``, ``parallelism_config`` (objects), ``attention_backend`` (a string),
        ``quantize_config`` (an object); None for what is not in the file.

    Raises:
        ValueError: For malformed files, unknown keys, values of the wrong type or out of range. The message names the
            file, the key, what was expected and what came.
        FileNotFoundError, ImportError: If there is no such file; for YAML where PyYAML is not installed.

    Example:
        >>> cachedit.enable_cache(pipe, cachedit.load_configs("cache.yaml")["cache_config"])
    """
    content, where = read_document(path_or_dict)
    cache_config, calibrator_config = _cache_configs(content, where, **kwargs)
    loaded = {
        "cache_config": cache_config,
        "calibrator_config": calibrator_config,
        "parallelism_config": _parallelism_config(content, where),
        "attention_backend": _typed(content.get("attention_backend"), str, f"{where}attention_backend"),
        "quantize_config": _quantize_config(content, where),
    }
    return loaded if return_dict else tuple(loaded.values())


def load_cache_config(path_or_dict: Document, **kwargs: Any) -> Loaded:
    """Load the cache and calibrator configuration only: arguments and errors as for :func:`load_configs`.

    Returns:
        ``(cache_config, calibrator_config)``; both None for a file with other sections only.
    """
    content, where = read_document(path_or_dict)
    return _cache_configs(content, where, **kwargs)


def load_parallelism_config(
    path_or_dict: Document, check_only: bool = False, **kwargs: Any
) -> ParallelismConfig | bool | None:
    """Load the section ``parallelism_config``: arguments and errors as for :func:`load_configs`.

    Returns:
        The configuration, or None where there is no such section; with ``check_only``, whether there is one.
    """
    section: ParallelismConfig | None = load_configs(path_or_dict, **kwargs)["parallelism_config"]
    return section is not None if check_only else section


def load_attn_backend_config(path_or_dict: Document, **kwargs: Any) -> str | None:
    """Load ``attention_backend``, a name or None: arguments and errors as for :func:`load_configs`."""
    backend: str | None = load_configs(path_or_dict, **kwargs)["attention_backend"]
    return backend


def load_quantize_config(path_or_dict: Document, **kwargs: Any) -> QuantizeConfig | None:
    """Load the section ``quantize_config``, an object or None: arguments and errors as for :func:`load_configs`."""
    section: QuantizeConfig | None = load_configs(path_or_dict, **kwargs)["quantize_config"]
    return section


def load_options(path_or_dict: Document, reset: bool = False) -> dict[str, Any]:
    """Deprecated: :func:`load_configs` under its old name. Returns the two configurations that are not None."""
    warnings.warn("load_options is deprecated, use load_configs", DeprecationWarning, stacklevel=2)
    options = zip(("cache_config", "calibrator_config"), load_cache_config(path_or_dict, reset=reset), strict=True)
    return {name: config for name, config in options if config is not None}


def _cache_configs(content: dict[str, Any], where: str, reset: bool = False, auto_parallel_size: bool = True) -> Loaded:
    if not any(key in content for key in _SECTIONS):
        return _cache_section(content, where, reset, hints=_SECTIONS)  # the older, flat form
    for key in content:
        if key in _cache_keys(DBCacheConfig):
            raise ValueError(f"{where}{key}: belongs in the section cache_config")
    _check_keys(content, _SECTIONS, where)
    if "cache_config" not in content:
        return None, None
    section = content["cache_config"]
    if section is None:
        raise ValueError(f"{where}cache_config must be a mapping, got None ({{}} for the defaults)")
    return _cache_section(_typed(section, Mapping, f"{where}cache_config"), f"{where}cache_config: ", reset)


def _cache_keys(config_class: type[BasicCacheConfig]) -> list[str]:
    fields = [field.name for field in dataclasses.fields(config_class)]
    return [*fields, *_CALIBRATORS, *dict.fromkeys(key for row in _CALIBRATORS.values() for key in row.keys)]


def _cache_section(section: Mapping[str, Any], where: str, reset: bool, hints: Iterable[str] = ()) -> Loaded:
    cache_type = str(section.get("cache_type") or "DBCache")
    config_class = _CACHE_TYPES.get(cache_type)
    if config_class is None:
        raise ValueError(f"{where}cache_type must be one of {', '.join(_CACHE_TYPES)}, got {cache_type}")
    known = _cache_keys(config_class)
    for key in _MISSPELT.keys() & section.keys():
        logger.warning("%s%s: read as %s", where, key, _MISSPELT[key])
    section = {_MISSPELT.get(key, key): value for key, value in section.items()}
    for key in section:
        owners = [name for name, other in _CACHE_TYPES.items() if key in _cache_keys(other)]
        if owners and key not in known:
            raise ValueError(f"{where}{key}: goes with cache_type {' or '.join(owners)} only, not with {cache_type}")
    _check_keys(section, known, where, hints)
    given = {key: value for key, value in section.items() if value is not None}
    values = {field.name: given[field.name] for field in dataclasses.fields(config_class) if field.name in given}
    if "cache_type" in values:
        values["cache_type"] = config_class.cache_type
    if "steps_computation_mask" in values:
        values["steps_computation_mask"] = _mask(given, where)
    config = _build(config_class, values, where, {"total_steps:": "num_inference_steps:"})  # how steps_mask calls it
    return config_class().reset(**values) if reset else config, _calibrator_config(given, where)


def _mask(given: Mapping[str, Any], where: str) -> str | list[int]:
    mask = given["steps_computation_mask"]
    if isinstance(mask, str) and mask in MASK_POLICIES:
        return mask
    if isinstance(mask, str) and mask and set(mask) <= {"0", "1"}:
        return [int(digit) for digit in mask]
    if isinstance(mask, Mapping) and mask:
        where += "steps_computation_mask: "
        _check_keys(mask, ("compute_bins", "cache_bins"), where)
        try:
            bins = {name: _typed(value, Sequence, name) for name, value in mask.items()}
            return steps_mask(**bins, total_steps=given.get("num_inference_steps"), mask_policy=None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}{error}".replace("total_steps", "num_inference_steps")) from None
    if isinstance(mask, Sequence) and not isinstance(mask, str):
        return list(mask)
    raise ValueError(
        f"{where}steps_computation_mask must be one of {', '.join(MASK_POLICIES)}, a list of 0 and 1, a string of them "
        f'in quotes such as "1101", or compute_bins and cache_bins, got {mask!r}'
    )


def _calibrator_config(given: Mapping[str, Any], where: str) -> CalibratorConfig | None:
    enabled = [key for key in _CALIBRATORS if _typed(given.get(key), bool, f"{where}{key}")]
    if len(enabled) > 1:
        raise ValueError(f"{where}{' and '.join(enabled)} exclude each other: at most one may be true")
    for key in given:
        owners = [enable for enable, row in _CALIBRATORS.items() if key in row.keys]
        if owners and not any(owner in given for owner in owners):
            logger.warning("%s%s has no effect without %s", where, key, " or ".join(owners))
    if not enabled:
        return None
    row = _CALIBRATORS[enabled[0]]
    names = {field: key for key, field in row.keys.items() if key in given}
    values = {"enable_encoder_calibrator": row.encoder} | {field: given[key] for field, key in names.items()}
    return _build(row.config, values, where, names)


def _build(config_class: type[AnyConfig], values: dict[str, Any], where: str, names: Mapping[str, str]) -> AnyConfig:
    """Make a configuration from ``values``, converted in place; ``names`` is what the file calls a field."""
    for field, kind in itertools.product(dataclasses.fields(config_class), (bool, float)):  # validate() does the rest
        if field.name in values and kind.__name__ in str(field.type).split(" | "):
            values[field.name] = _typed(values[field.name], kind, where + names.get(field.name, field.name))
    config = config_class(**values)
    try:
        config.validate()
    except (TypeError, ValueError) as error:
        field_name, _, rest = str(error).partition(" ")
        raise ValueError(f"{where}{names.get(field_name, field_name)} {rest}") from None
    return config


def _parallelism_config(content: Mapping[str, Any], where: str) -> ParallelismConfig | None:
    section = _plain_section(content, "parallelism_config", _PARALLELISM_KEYS, where)
    if section is None:
        return None
    where += "parallelism_config: "
    for short, name in _SIZES.items():
        if short in section and section.setdefault(name, section[short]) != section.pop(short):
            raise ValueError(f"{where}{short} and {name} are one setting, but have two values")
    try:
        fields = {name: value for name, value in section.items() if name not in _RAY_KEYS and value is not None}
        config = ParallelismConfig(**fields)
        config.validate()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}{error}") from None
    return config


def _quantize_config(content: Mapping[str, Any], where: str) -> QuantizeConfig | None:
    section = _plain_section(content, "quantize_config", _QUANTIZE_KEYS, where)
    if section is None:
        return None
    # exclude_layers may be null: nothing is left out then.
    fields = {name: value for name, value in section.items() if value is not None or name == "exclude_layers"}
    try:
        config = QuantizeConfig(**fields)
        config.validate()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}quantize_config: {error}") from None
    return config


def _plain_section(content: Mapping[str, Any], name: str, known: Collection[str], where: str) -> dict[str, Any] | None:
    section = _typed(content.get(name), Mapping, f"{where}{name}")
    _check_keys(section or (), known, f"{where}{name}: ")
    return None if section is None else dict(section)


def _check_keys(keys: Iterable[str], known: Collection[str], where: str, hints: Iterable[str] = ()) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), [*known, *hints], n=1)
            hint = f"did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
            raise ValueError(f"{where}{key}: {hint}")


def _typed(value: Any, kind: type, name: str) -> Any:
    """Return ``value`` after checking its type; None passes. A number may be text: YAML reads 1e-1 as a string."""
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be {_TYPE_NAMES[kind]}, got {value!r}")
    return value
