"""C++ that only tests build: with a compiler, outside of the package."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not (ROOT / "csrc").exists(), reason="needs g++ and a checkout"
)


def build(library: Path, *sources: str, includes: tuple[str | Path, ...] = ()) -> None:
    """Compile sources, relative to the checkout, into a shared library."""
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fvisibility=hidden"]
    command += ["-fPIC", "-shared", f"-I{ROOT / 'csrc'}", *(f"-isystem{include}" for include in includes)]
    run(*command, *(str(ROOT / source) for source in sources), "-o", str(library))


def build_cuda(library: Path, *sources: str) -> str:
    """The same with nvcc, for Ada and Hopper; returns what the assembler says about registers."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O2", "-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden", "-Xptxas=-v", "-shared"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("89", "90a")]
    return run(*command, f"-I{ROOT / 'csrc'}", *(str(ROOT / source) for source in sources), "-o", str(library))


def cuda_headers() -> Path:
    """Where nvcc's headers are."""
    assert NVCC is not None
    for line in run(NVCC, "--dryrun", "-x", "cu", "-E", "/dev/null").splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")) / "include"
    raise AssertionError("nvcc does not tell where it is")


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr
