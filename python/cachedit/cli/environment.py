"""Cache settings from the environment: the variables of SGLang's diffusion server, and the same under our name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..calibrator import CalibratorConfig, TaylorSeerCalibratorConfig
from ..config import BasicCacheConfig, DBCacheConfig
from ..mask import MASK_POLICIES, steps_mask

__all__ = ["PREFIXES", "VARIABLES", "CacheSettings", "cache_from_environment"]

logger = logging.getLogger(__name__)

PREFIXES = ("CACHEDIT_", "SGLANG_CACHE_DIT_")  # the first one that is set counts
SECOND = "SGLANG_CACHE_DIT_SECONDARY_"  # a second transformer's own settings, which are not read here

CacheSettings = tuple[BasicCacheConfig | None, CalibratorConfig | None]


def _switch(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError("true or false")
    return known[text.lower()]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("an integer") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def _bins(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError("integers with commas between") from None


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


class Variable(NamedTuple):
    """How a variable is read; ``parse`` raises ValueError with what it expects."""

    parse: Callable[[str], Any]
    default: Any


# SGLang's defaults, but that the cache is on: this command has no other purpose.
VARIABLES: dict[str, Variable] = {
    "ENABLED": Variable(_switch, True),
    "FN": Variable(_integer, 1),
    "BN": Variable(_integer, 0),
    "WARMUP": Variable(_integer, 4),
    "RDT": Variable(_number, 0.24),
    "MC": Variable(_integer, 3),
    "TAYLORSEER": Variable(_switch, False),
    "TS_ORDER": Variable(_integer, 1),
    "SCM_PRESET": Variable(_one_of("none", *MASK_POLICIES), "none"),
    "SCM_COMPUTE_BINS": Variable(_bins, None),
    "SCM_CACHE_BINS": Variable(_bins, None),
    "SCM_POLICY": Variable(_one_of("dynamic", "static"), "dynamic"),
}


def cache_from_environment(environment: Mapping[str, str], steps: int | None) -> CacheSettings:
    """Return the cache and calibrator configuration that the variables ask for.

    Args:
        environment: Variables by name; those of :data:`VARIABLES` after one of :data:`PREFIXES` are looked at. Empty
            ones count as not set.
        steps: Denoising steps, at which a mask from bins is cut; None: as many as the bins have.

    Returns:
        ``(cache_config, calibrator_config)``; both None where ``ENABLED`` is false, the second without ``TAYLORSEER``.

    Raises:
        ValueError: For a value that cannot be used; the message names the variable.
    """
    values = {name: _value(environment, name) for name in VARIABLES}
    if not values["ENABLED"]:
        return None, None
    if any(name.startswith(SECOND) for name in environment):
        logger.warning("%s* has no effect: all transformers get the same settings", SECOND)
    cache = DBCacheConfig(
        Fn_compute_blocks=values["FN"],
        Bn_compute_blocks=values["BN"],
        max_warmup_steps=values["WARMUP"],
        residual_diff_threshold=values["RDT"],
        max_continuous_cached_steps=values["MC"],
        steps_computation_mask=_mask(values, steps),
        steps_computation_policy=values["SCM_POLICY"],
    )
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=values["TS_ORDER"]) if values["TAYLORSEER"] else None
    for config in (cache, calibrator):
        if config is not None:
            _validated(config)
    return cache, calibrator


def _value(environment: Mapping[str, str], name: str) -> Any:
    for prefix in PREFIXES:
        text = environment.get(prefix + name, "").strip()
        if text:
            try:
                return VARIABLES[name].parse(text)
            except ValueError as error:
                raise ValueError(f"{prefix}{name} must be {error}, got {text!r}") from None
    return VARIABLES[name].default


def _mask(values: Mapping[str, Any], steps: int | None) -> list[int] | str | None:
    compute, cache = values["SCM_COMPUTE_BINS"], values["SCM_CACHE_BINS"]
    if compute is None and cache is None:
        return None if values["SCM_PRESET"] == "none" else str(values["SCM_PRESET"])
    try:
        return steps_mask(compute, cache, total_steps=steps)
    except ValueError as error:
        raise ValueError(f"SCM_COMPUTE_BINS and SCM_CACHE_BINS: {error}") from None


def _validated(config: BasicCacheConfig | CalibratorConfig) -> None:
    try:
        config.validate()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{PREFIXES[0]}* or {PREFIXES[1]}*: {error}") from None
