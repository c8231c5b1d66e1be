"""Which implementation serves each operator on each device, and why.

Chosen once, at import. CPU tensors go to the compiled library ("cpp"), CUDA tensors to Triton or to the compiled
library's CUDA kernels ("cuda"), as cuda_defaults.csv says; plain torch ("reference") stands in where these are missing.
CACHEDIT_KERNELS_BACKEND=cpp|cuda|triton|reference forces one.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cachedit_kernels import _checks, _native
from cachedit_kernels._library import LIBRARY

VARIABLE = "CACHEDIT_KERNELS_BACKEND"
IMPLEMENTATIONS = ("cpp", "cuda", "triton", "reference")
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


# Operators with a CUDA kernel in the compiled library, and what serves CUDA tensors where Triton is there too. Entries
# without figures are not measured; benchmarks/choose_backends.py fills them from what gpu_check.sh measured.
with Path(__file__).with_name("cuda_defaults.csv").open(newline="") as _file:
    CUDA_DEFAULTS = {row["operator"]: row for row in csv.DictReader(_file)}


class Backend(NamedTuple):
    """`implementation` is one of IMPLEMENTATIONS, or "none" where a forced one does not serve the device."""

    implementation: str
    reason: str


def backends() -> dict[str, dict[str, Backend]]:
    """Which implementation each operator uses on each device type, and why: `backends()["l1"]["cpu"].reason`."""
    return {name: dict(devices) for name, devices in _chosen.items()}


def register() -> None:
    """Chooses and registers the implementations; called once, when the package is imported."""
    forced = os.environ.get(VARIABLE)
    if forced is not None and forced not in IMPLEMENTATIONS:
        raise RuntimeError(f"{VARIABLE} must be one of {', '.join(IMPLEMENTATIONS)}, got {forced!r}")
    _chosen.update(_choose_default() if forced is None else _choose_forced(forced))
    for name, operator in OPERATORS.items():
        for device, backend in _chosen[name].items():
            if backend.implementation == "cpp":  # the compiled library has registered itself
                continue
            implementation = _python_implementation(name, operator, device)
            for overload in operator.overloads:
                if backend.implementation == "cuda":
                    _native.register_cuda(overload, DISPATCH_KEYS[device])
                else:
                    LIBRARY.impl(overload, implementation, DISPATCH_KEYS[device])


Devices = dict[str, Backend]
_chosen: dict[str, Devices] = {}


def _choose_default() -> dict[str, Devices]:
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
    other = Backend("reference", "there is nothing faster")
    return {name: {"cpu": cpu, "cuda": _default_for_cuda(name), "other": other} for name in OPERATORS}


def _default_for_cuda(name: str) -> Backend:
    has_triton = importlib.util.find_spec("triton") is not None
    entry = CUDA_DEFAULTS.get(name)
    if has_triton and (entry is None or entry["serves"] == "triton"):
        return Backend("triton", f"triton is installed; {_compared(entry)}")
    usable, reason = _native.cuda() if entry else (False, "there is no CUDA C++ kernel")
    if usable and (unserved := _native.unserved_gpu()):
        usable, reason = False, unserved
    if usable:
        return Backend("cuda", f"{_compared(entry) if has_triton else 'triton is not installed'}: {reason}")
    if has_triton:
        return Backend("triton", f"CUDA C++ would be faster, but {reason}")
    return Backend("reference", f"triton is not installed, and {reason}")


def _compared(entry: dict[str, str] | None) -> str:
    """How an operator's kernels compare, as the table has it."""
    if entry is None:
        return "there is no CUDA C++ kernel"
    if not entry["cuda_over_triton"]:
        return "CUDA C++ has not been measured"
    return f"CUDA C++ is {entry['cuda_over_triton']} times as fast on {entry['device']}"


def _choose_forced(forced: str) -> dict[str, Devices]:
    because = f"forced by {VARIABLE}"
    nothing = dict.fromkeys(DISPATCH_KEYS, Backend("none", f"{VARIABLE}={forced} does not serve them"))
    if forced == "cuda":
        return {name: nothing | {"cuda": _forced_cuda(name, because)} for name in OPERATORS}
    return dict.fromkeys(OPERATORS, nothing | _forced_for_all(forced, because))


def _forced_cuda(name: str, because: str) -> Backend:
    usable, reason = _native.cuda()
    if not usable:
        raise RuntimeError(f"{VARIABLE}=cuda, but {reason}")
    if name in CUDA_DEFAULTS:
        return Backend("cuda", f"{because}: {reason}")
    return _default_for_cuda(name)  # an engine needs them all


def _forced_for_all(forced: str, because: str) -> Devices:
    """What serves every operator, on the devices where it does."""
    if forced == "reference":
        return dict.fromkeys(DISPATCH_KEYS, Backend("reference", because))
    if forced == "cpp":
        loaded, reason = _native.load()
        if not loaded:
            raise RuntimeError(f"{VARIABLE}=cpp, but {reason}")
        return {"cpu": Backend("cpp", f"{because}: {reason}")}
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{VARIABLE}=triton, but triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreted = Backend("triton", f"{because}, interpreted")
        return {"cpu": interpreted, "cuda": interpreted}
    if not torch.cuda.is_available():
        raise RuntimeError(f"{VARIABLE}=triton needs a CUDA device, or TRITON_INTERPRET=1 to interpret kernels on CPU")
    return {"cuda": Backend("triton", because)}


def _python_implementation(name: str, operator: Operator, device: str) -> Callable[..., Any]:
    """What the dispatcher calls: checks, then the implementation, whose module is imported on the first call."""
    implementation, reason = _chosen[name][device]
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
