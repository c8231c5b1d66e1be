"""Which implementation serves each operator on each device, and why.

Chosen once, at import. CPU tensors go to the compiled library ("cpp"), CUDA tensors to Triton; plain torch
("reference") stands in where one of these is missing. CACHEDIT_KERNELS_BACKEND=cpp|triton|reference forces one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cachedit_kernels import _checks, _native
from cachedit_kernels._library import LIBRARY

VARIABLE = "CACHEDIT_KERNELS_BACKEND"
IMPLEMENTATIONS = ("cpp", "triton", "reference")
# Device types, as `backends()` names them, and the dispatch keys that serve them. The last key also takes calls without
# any tensor, which the checks refuse.
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "other": "CompositeExplicitAutograd"}


class Operator(NamedTuple):
    folder: str
    overloads: tuple[str, ...]
    required: int  # number of arguments without a default
    defaults: tuple[Any, ...] = ()


OPERATORS = {
    "residual_l1": Operator("residual", ("residual_l1",), 3, (False,)),
    "l1": Operator("residual", ("l1",), 2, (False,)),
    "residual_push": Operator("residual", ("residual_push", "residual_push.int"), 4),
    "residual_push_float8": Operator("residual", ("residual_push_float8", "residual_push_float8.int"), 5),
    "residual_forecast": Operator("forecast", ("residual_forecast", "residual_forecast.floats"), 3, (1.0,)),
    "residual_forecast_float8": Operator(
        "forecast", ("residual_forecast_float8", "residual_forecast_float8.floats"), 5
    ),
    "ring_gram": Operator("gram", ("ring_gram",), 1, (None, False)),
    "ring_gram_float8": Operator("gram", ("ring_gram_float8",), 4),
    "merge_attention": Operator("attention", ("merge_attention",), 4),
    "ulysses_pack": Operator("ulysses", ("ulysses_pack",), 4),
    "ulysses_unpack": Operator("ulysses", ("ulysses_unpack",), 6, (True,)),
}


class Backend(NamedTuple):
    """`implementation` is "cpp", "triton" or "reference", or "none" where a forced one does not serve the device."""

    implementation: str
    reason: str


def backends() -> dict[str, dict[str, Backend]]:
    """Which implementation each operator uses on each device type, and why: `backends()["l1"]["cpu"].reason`."""
    return {name: dict(_chosen) for name in OPERATORS}


def register() -> None:
    """Chooses and registers the implementations; called once, when the package is imported."""
    forced = os.environ.get(VARIABLE)
    if forced is not None and forced not in IMPLEMENTATIONS:
        raise RuntimeError(f"{VARIABLE} must be one of {', '.join(IMPLEMENTATIONS)}, got {forced!r}")
    _chosen.update(_choose_default() if forced is None else _choose_forced(forced))
    for device, backend in _chosen.items():
        if backend.implementation == "cpp":  # the compiled library has registered itself
            continue
        for name, operator in OPERATORS.items():
            implementation = _python_implementation(name, operator, device)
            for overload in operator.overloads:
                LIBRARY.impl(overload, implementation, DISPATCH_KEYS[device])


_chosen: dict[str, Backend] = {}


def _choose_default() -> dict[str, Backend]:
    loaded, reason = _native.load()
    if loaded:
        cpu = Backend("cpp", reason)
    else:
        cpu = Backend("reference", f"the C++ operators are missing: {reason}")
        warnings.warn(
            f"cachedit_kernels runs in plain torch on CPU, which is slower: {reason}. To build the C++ operators, "
            "install a C++17 compiler and run `pip install --force-reinstall --no-deps cachedit-kernels` (or "
            f"`pip install -e .` in a checkout); {VARIABLE}=reference silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
    if importlib.util.find_spec("triton") is not None:
        cuda = Backend("triton", "triton is installed")
    else:
        cuda = Backend("reference", "triton is not installed")
    return {"cpu": cpu, "cuda": cuda, "other": Backend("reference", "there is nothing faster")}


def _choose_forced(forced: str) -> dict[str, Backend]:
    because = f"forced by {VARIABLE}"
    chosen = dict.fromkeys(DISPATCH_KEYS, Backend("none", f"{VARIABLE}={forced} does not serve them"))
    if forced == "reference":
        return dict.fromkeys(DISPATCH_KEYS, Backend("reference", because))
    if forced == "cpp":
        loaded, reason = _native.load()
        if not loaded:
            raise RuntimeError(f"{VARIABLE}=cpp, but {reason}")
        return chosen | {"cpu": Backend("cpp", f"{because}: {reason}")}
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{VARIABLE}=triton, but triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreted = Backend("triton", f"{because}, interpreted")
        return chosen | {"cpu": interpreted, "cuda": interpreted}
    if not torch.cuda.is_available():
        raise RuntimeError(f"{VARIABLE}=triton needs a CUDA device, or TRITON_INTERPRET=1 to interpret kernels on CPU")
    return chosen | {"cuda": Backend("triton", because)}


def _python_implementation(name: str, operator: Operator, device: str) -> Callable[..., Any]:
    """What the dispatcher calls: checks, then the implementation, whose module is imported on the first call."""
    implementation, reason = _chosen[device]
    module = f"cachedit_kernels.{operator.folder}.{'kernel' if implementation == 'triton' else 'reference'}"
    check = getattr(_checks, name)

    def run(*args: Any) -> Any:
        check(*args)
        if implementation == "none":
            tensor = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            raise RuntimeError(f"{name}: no implementation for {tensor.device.type} tensors: {reason}")
        return getattr(importlib.import_module(module), name)(*args)

    uncompiled: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal uncompiled
        args += operator.defaults[len(args) - operator.required :]  # the dispatcher leaves out what equals its default
        if "torch._dynamo" not in sys.modules:  # importing it takes more than a second
            return run(*args)
        if uncompiled is None:  # called from a frame that torch.compile skips, `run` would be compiled by itself
            uncompiled = torch.compiler.disable(run)
        return uncompiled(*args)

    return call
