"""The CUDA C++ kernels compiled for the CPU: the .cu files as they are, `cuda_on_host/` in place of CUDA's headers.

    PYTHONPATH=tests/helpers CUDA_ON_HOST=library.so python -m pytest -p cuda_kernels ...

runs tests with them behind the operators for CPU tensors.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = os.environ.get("CUDA_ON_HOST")


def compile_for_host(library: Path) -> None:
    """Builds the kernels and what registers them."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or pytest.skip("no g++")
    torch = Path(importlib.util.find_spec("torch").origin).parent
    sources = ROOT / "csrc"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{Path(__file__).with_name('cuda_on_host')}"]
    options += [f"-I{sources}", f"-isystem{torch / 'include'}", f"-L{torch / 'lib'}"]
    others = {"graphs", "policy"}  # composition of CUDA graphs, which has a stand-in of its own (tests/native)
    cpp = (path for path in sorted((sources / "cuda").glob("*.cpp")) if path.stem not in others)
    files = [*cpp, sources / "checks.cpp", sources / "stable.cpp"]
    kernels = [path for path in sorted((sources / "cuda").glob("*.cu")) if path.stem not in others]
    command = [compiler, *options, "-xc++", *files, *kernels, "-xnone", "-ltorch_cpu", "-ldl", "-o", library]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]


def pytest_configure() -> None:
    if LIBRARY is None:
        return
    from cachedit_kernels._backend import OPERATORS

    library = ctypes.CDLL(LIBRARY)
    for operator in OPERATORS.values():
        for overload in operator.overloads:
            library.cachedit_cuda_register(overload.encode(), b"CPU")
