"""The CUDA C++ kernels' machine code: built as the wheel builds it, for Ada and Hopper; needs nvcc but no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ("sm_89", "sm_90a")
KERNELS = ("sums_kernel", "push_kernel", "forecast_kernel", "merge_kernel", "exchange_kernel")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs a checkout"),
    pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("cmake")), reason="no nvcc or no CMake"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the object files, and what the assembler said."""
    folder = tmp_path_factory.mktemp("cuda")
    generator = ["-GNinja"] if shutil.which("ninja") else []
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run("cmake", f"-S{ROOT}", f"-B{folder}", *generator, "-DCMAKE_BUILD_TYPE=Release", "-DCACHEDIT_CUDA=ON", python)
    return folder, run("cmake", "--build", str(folder), "--target", "kernels_cuda")


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def test_no_registers_are_spilled(build: tuple[Path, str]) -> None:
    _, log = build
    compiled = re.findall(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    for kernel in KERNELS:
        assert {arch for name, arch, *_ in compiled if kernel in name} == set(ARCHITECTURES), log[-4000:]
    for name, arch, stores, loads, registers in compiled:
        assert (stores, loads) == ("0", "0"), (name, arch)
        assert int(registers) <= 85, (name, arch, registers)  # three blocks of 256 threads on a multiprocessor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_is_accessed_16_bytes_at_a_time(build: tuple[Path, str], architecture: str) -> None:
    """Per element type: two vectors of each input in flight, and two stores."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this Triton has no cuobjdump")
    accesses: dict[str, Counter[str]] = {}
    for file in build[0].rglob("*.cu.o"):
        for text in run(str(cuobjdump), "-sass", "-arch", architecture, str(file)).split("Function : ")[1:]:
            accesses[text.split()[0]] = Counter(re.findall(r"\b(LDG\.E\.128|STG\.E\.128)\b", text))
    for kernel, loads, stores in (("push_kernel", 4, 2), ("forecast_kernel", 4, 2), ("PlainTerms", 4, 0)):
        (found,) = (count for name, count in accesses.items() if kernel in name)
        assert found["LDG.E.128"] >= 3 * loads and found["STG.E.128"] >= 3 * stores, (kernel, found)
