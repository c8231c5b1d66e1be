"""Steps as CUDA graphs that decide on the device whether to reuse or to compute. Experimental: not yet run on a GPU.

A step is put together from graphs that torch captured (``torch.cuda.CUDAGraph(keep_graph=True)``)::

    control = Control(Rules(threshold=0.08, warmup=4, order=1), device)
    with StepGraph(device) as step:
        step.add(head)                                        # ends with sums = residual_l1(...)
        step.branch(control, sums, reuse=reuse, compute=compute)
        step.add(tail)
        launch = step.instantiate()
    control.begin()
    for _ in range(steps):
        launch()                                              # no wait for the device
    control.records()

The captured ``residual_push`` takes ``control.slot``, the captured ``residual_forecast`` ``control.weights[0]`` (or
``[1]`` for streams that are reused as they are). The decision is that of ``csrc/policy.h``.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cachedit_kernels import _native

__all__ = [
    "MAX_MASK",
    "MAX_RECORDS",
    "REASONS",
    "Control",
    "Progress",
    "Record",
    "Rules",
    "StepGraph",
    "unavailable",
]

REASONS = (  # in the order of csrc/policy.h
    "nothing stored",
    "warm-up",
    "mask",
    "max_cached_steps",
    "max_continuous_cached_steps",
    "accumulated diff",
    "threshold",
    "non-finite diff",
    "diff",
)
MAX_RECORDS = 1024  # of a request, as in csrc/cuda/control.h
MAX_MASK = 1024  # steps, as in csrc/policy.h


class Rules(NamedTuple):
    """What a section's steps are decided by; fields mean what they do in ``cachedit.DBCacheConfig``."""

    threshold: float = 0.0
    accumulated_limit: float = 0.0
    """0 or less: none."""
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    warmup: int = 0
    warmup_interval: int = 1
    refresh_hint: int = 0
    """0: none."""
    refresh_repeats: bool = False
    mask: Sequence[int] = ()
    """1 computes; at most 1024 steps (MAX_MASK). Empty: none."""
    mask_is_static: bool = False
    order: int = 0
    """Of TaylorSeer, 1 to 4; 0 reuses the last residual as it is. order + 1 residuals are kept."""


class Progress(NamedTuple):
    """Where a request stands that a control takes over."""

    step: int = 0
    """The one to come."""
    origin: int = 0
    """Where the cache last started over."""
    reused: int = 0
    run: int = 0
    """Reused in a row."""
    accumulated: float = 0.0
    stored: bool = False
    next_slot: int = 0
    steps: Sequence[int] = ()
    """Whose residuals are stored, newest first."""


class Record(NamedTuple):
    """What happened at one step."""

    step: int
    reused: bool
    diff: float | None
    """None where it was not needed."""
    reason: str


class Control:
    """Decides the steps of one section on one branch of a request, in memory of its own on the device.

    Args:
        rules: What to decide by.
        device: Where the graphs run.

    Attributes:
        slot: int64 [], the ring's slot that a computed step writes to.
        weights: float32 [2, order + 1], by slot: of the forecast, and of the last residual as it is.

    Raises:
        ValueError: For an order or a mask that the device cannot hold.
        RuntimeError: Where the compiled library has no CUDA part.
    """

    def __init__(self, rules: Rules, device: torch.device | str = "cuda"):
        device = torch.device(device)
        self.rules = rules
        self.memory = torch.empty(_call("control_bytes"), dtype=torch.uint8, device=device)
        self.begin()  # says what it cannot hold, before anything is laid out by it
        self.slot = torch.zeros((), dtype=torch.int64, device=device)
        self.weights = torch.zeros((2, rules.order + 1), dtype=torch.float32, device=device)

    def begin(self, at: Progress | None = None, rules: Rules | None = None) -> None:
        """Start a request, in the order of the current stream and without waiting for it; nothing is recorded yet.

        Args:
            at: Where it stands, if it is taken over. Default: at its first step, with nothing stored.
            rules: Others, of the same order. Default: those that were given before.

        Raises:
            ValueError: For a mask, an order or stored steps that the control has no room for. Nothing changes then.
        """
        rules = self.rules if rules is None else rules
        if rules.order != self.rules.order:
            raise ValueError(f"rules.order must be {self.rules.order}, as the control was made for, got {rules.order}")
        # Made anew each time: an earlier copy may still be on its way (torch keeps its memory until then).
        host = torch.zeros(len(self.memory), dtype=torch.uint8, pin_memory=self.memory.is_cuda)
        mask = bytes(map(bool, rules.mask)) or None
        limits = (mask, len(rules.mask), rules.mask_is_static, rules.order)
        _check_value("control_init", host.data_ptr(), *rules[:8], *limits)
        if at is not None:
            steps = (c_int64 * len(at.steps))(*at.steps)
            _check_value("control_resume", host.data_ptr(), *at[:7], steps, len(at.steps))
        self.rules = rules
        self.memory.copy_(host, non_blocking=True)

    def set_step(self, step: int) -> None:
        """Number the step to come, where it is not the one after the last: a guidance branch need not run at each."""
        _check("control_set_step", self.memory.data_ptr(), step, _stream(self.memory.device))

    def records(self) -> list[Record]:
        """Read back what happened since :meth:`begin`, at most 1024 steps of it; waits for the device.

        Any thread may ask, whatever stream the steps were launched on.
        """
        if self.memory.is_cuda:
            torch.cuda.synchronize(self.memory.device)
        memory = self.memory.cpu()
        steps = _call("control_records", memory.data_ptr(), None, 0)
        rows = torch.zeros((min(steps, MAX_RECORDS), 5), dtype=torch.float64)
        _call("control_records", memory.data_ptr(), rows.data_ptr(), len(rows))
        return [
            Record(int(step), bool(reused), diff if measured else None, REASONS[int(reason)])
            for step, reused, measured, diff, reason in rows.tolist()
        ]


class StepGraph:
    """A step in the making: pieces run one after the other. The graphs given are copied, the memory they use is not.

    Close it (or use ``with``) once it is instantiated.

    Args:
        device: Where the graphs run.

    Raises:
        RuntimeError: Where the compiled library has no CUDA part, or CUDA refuses.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self._kept: list[Any] = []  # what the graphs point to
        self._step = c_void_p()
        _check("step_new", byref(self._step))

    def __enter__(self) -> StepGraph:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is not needed for launching."""
        if self._step:
            _call("step_free", self._step)
            self._step = c_void_p()

    def add(self, graph: Any) -> None:
        """Add a captured graph.

        Args:
            graph: ``torch.cuda.CUDAGraph`` captured with ``keep_graph=True``.
        """
        with self._on_device():
            _check("step_add", self._step, _raw(graph))
        self._kept.append(graph)

    def policy(self, control: Control, sums: Tensor | None = None) -> None:
        """Let the control take a step without asking it, as where a static mask has the host choose the graph."""
        with self._on_device():
            _check("step_add_policy", self._step, *self._arguments(control, sums))

    def branch(self, control: Control, sums: Tensor, reuse: Any, compute: Any) -> None:
        """Let the control decide between two captured graphs.

        Args:
            control: Decides, and writes its slot and weights.
            sums: float32 [S, 2] from ``residual_l1``, written by an earlier piece; hidden_states come first.
            reuse: Captured graph, runs on a reused step.
            compute: Captured graph, runs on a computed step.

        Raises:
            RuntimeError: If a graph holds what a conditional one may not, or the driver is older than CUDA 12.8.
        """
        with self._on_device():
            _check("step_add_branch", self._step, *self._arguments(control, sums), _raw(reuse), _raw(compute))
        self._kept += [reuse, compute]

    def instantiate(self) -> Callable[[], None]:
        """Return a function that launches the step on the current stream, and keeps alive what it works on."""
        with self._on_device():
            return _Launch(self._step, self.device, self._kept)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Nodes belong to the device that is current when they are made."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _arguments(self, control: Control, sums: Tensor | None) -> tuple[Any, ...]:
        device = control.memory.device
        if sums is not None and (sums.dtype != torch.float32 or sums.numel() < 2 or sums.device != device):
            raise ValueError(
                f"sums must be float32 [S, 2] on {device}, got {sums.dtype} {list(sums.shape)} on {sums.device}"
            )
        self._kept += [control, sums]
        return (
            control.memory.data_ptr(),
            None if sums is None else sums.data_ptr(),
            control.slot.data_ptr(),
            control.weights.data_ptr(),
        )


class _Launch:
    def __init__(self, step: c_void_p, device: torch.device, kept: list[Any]):
        self.device = device
        self.kept = list(kept)
        self.graph = c_void_p()
        _check("step_instantiate", step, byref(self.graph))
        weakref.finalize(self, _functions()["exec_free"], self.graph)

    def __call__(self) -> None:
        _check("exec_launch", self.graph, _stream(self.device))


def _raw(graph: Any) -> c_void_p:
    return c_void_p(graph.raw_cuda_graph())


def _stream(device: torch.device) -> c_void_p:
    return c_void_p(torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)


# What a function of csrc/cuda/graphs.h returns and takes.
_POLICY: list[Any] = [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p]
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "control_bytes": (c_int64, []),
    "control_init": (
        c_char_p,
        [c_void_p, c_double, c_double, *[c_int64] * 5, c_bool, c_char_p, c_int64, c_bool, c_int],
    ),
    "control_resume": (
        c_char_p,
        [c_void_p, *[c_int64] * 4, c_double, c_bool, c_int, POINTER(c_int64), c_int],
    ),
    "control_records": (c_int64, [c_void_p, c_void_p, c_int64]),
    "control_set_step": (c_char_p, [c_void_p, c_int64, c_void_p]),
    "step_new": (c_char_p, [POINTER(c_void_p)]),
    "step_add": (c_char_p, [c_void_p, c_void_p]),
    "step_add_policy": (c_char_p, _POLICY),
    "step_add_branch": (c_char_p, [*_POLICY, c_void_p, c_void_p]),
    "step_instantiate": (c_char_p, [c_void_p, POINTER(c_void_p)]),
    "step_free": (None, [c_void_p]),
    "exec_launch": (c_char_p, [c_void_p, c_void_p]),
    "exec_free": (None, [c_void_p]),
}


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    try:
        return bind(ctypes.CDLL(str(_native.PATH)))
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"cachedit_kernels was built without its CUDA part: {error}") from None


def unavailable() -> str | None:
    """Why steps cannot be put together here, or None."""
    try:
        _functions()
    except RuntimeError as error:
        return str(error)
    return None


def bind(library: ctypes.CDLL) -> dict[str, Callable[..., Any]]:
    """The functions of a library that has them, by their names without the common prefix."""
    functions: dict[str, Callable[..., Any]] = {}
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"cachedit_cuda_{name}")
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


def _call(name: str, *arguments: Any) -> Any:
    return _functions()[name](*arguments)


def _check(name: str, *arguments: Any) -> None:
    error = _call(name, *arguments)
    if error is not None:
        raise RuntimeError(f"{name}: {error.decode(errors='replace')}")


def _check_value(name: str, *arguments: Any) -> None:
    error = _call(name, *arguments)
    if error is not None:
        raise ValueError(error.decode(errors="replace"))
