"""Compile Triton kernels for GPUs that are not here, through their real launch functions, and read the machine code.

    with compiling_for(90) as binaries:
        residual_l1(before, after, anchor)  # CPU tensors; nothing runs
    assert binaries[0].spills == 0

Inside the block a launch specialises on its arguments exactly as it would on the GPU (dtypes, the alignment of CPU
storage and of integers) and compiles, but does not run. It needs no driver, no GPU, and a process that was not started
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CAPABILITIES = (89, 90)


@dataclass(frozen=True)
class Binary:
    """Facts about one compiled kernel, as the assembler and the disassembler tell them."""

    name: str
    registers: int
    stack: int  # bytes of local memory per thread
    spills: int  # instructions that touch local memory
    shared: int  # bytes of shared memory per program
    loads: Counter[str]  # global loads and stores by width in bits, as in {"128": 6, "32": 2}
    stores: Counter[str]
    sass: str
    kernel: Any  # Triton's own; the same object where a launch found it compiled already


def compiled_for_each_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test for each `capability` that must compile; skips it where that can't be done."""
    reason = "this process interprets" if os.environ.get("TRITON_INTERPRET") == "1" else missing_tool()
    skip = pytest.mark.skipif(reason is not None, reason=reason or "")
    each = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: f"sm_{capability}")
    marked: Callable[..., None] = each(skip(test))
    return marked


def assert_lean(binary: Binary, registers: int) -> None:
    """No spills, no local memory, and no more registers per thread than said."""
    assert binary.spills == 0 and binary.stack == 0, f"{binary.name} uses local memory"
    assert binary.registers <= registers, f"{binary.name} takes {binary.registers} registers"


def missing_tool() -> str | None:
    """Why binaries can't be inspected here, or None where they can."""
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        if not (_tools() / tool).exists():
            return f"Triton's package carries no {tool}"
    return None


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Binary]]:
    """Turns launches into compilations for sm_`capability`; yields the list that their binaries are added to."""
    binaries: list[Binary] = []
    launch = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        binaries.append(_inspect(kernel))
        return kernel

    active = driver._active
    driver.set_active(_AbsentGPU(capability))
    JITFunction.run = compile_only
    try:
        yield binaries
    finally:
        JITFunction.run = launch
        driver._active = active


class _AbsentGPU:
    """As much of a Triton driver as compiling needs. Device numbers keep the targets' kernel caches apart."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return -self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def _tools() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@functools.cache
def _inspect(kernel: Any) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
    return Binary(
        name=kernel.metadata.name,
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=kernel.metadata.shared,
        loads=_widths("LDG", sass),
        stores=_widths("STG", sass),
        sass=sass,
        kernel=kernel,
    )


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([_tools() / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the output of cuobjdump: {text!r}")
    return int(match.group(1))


def _widths(instruction: str, sass: str) -> Counter[str]:
    widths: Counter[str] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        sizes = [m for m in modifiers.split(".") if m in {"128", "64", "U16", "S16", "U8", "S8"}]
        widths[sizes[0].lstrip("US") if sizes else "32"] += 1
    return widths
