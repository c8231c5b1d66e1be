"""What serves CUDA tensors, by the driver and the GPUs: the package as imported in a fresh process, a driver played."""

from __future__ import annotations

import csv
import ctypes
import shutil
import sys
from pathlib import Path

import pytest

import cachedit_kernels
from cachedit_kernels import _native
from native import build, needs_compiler
from operands import python

PRINT = "import cachedit_kernels; print(*cachedit_kernels.backends()['l1']['cuda'], sep=': ')"


def has_cuda_kernels() -> bool:
    return _native.PATH.exists() and hasattr(ctypes.CDLL(str(_native.PATH)), "cachedit_cuda_runtime_version")


pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="plays libcuda.so.1"),
    pytest.mark.skipif(not has_cuda_kernels(), reason="the library was built without nvcc"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the driver's libraries."""
    folder = tmp_path_factory.mktemp("driver")
    build(folder / "libcuda.so.1", "tests/native/driver.cpp")
    shutil.copy(folder / "libcuda.so.1", folder / "libnvidia-ml.so.1")
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which CUDA C++ has been measured to be the faster for l1."""
    folder = tmp_path_factory.mktemp("package")
    source = Path(cachedit_kernels.__file__).parent
    shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    table = folder / source.name / "cuda_defaults.csv"
    with table.open() as file:
        entries = list(csv.DictReader(file))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(entries[0]))
        writer.writeheader()
        for entry in entries:
            if entry["operator"] == "l1":
                entry |= {"serves": "cuda", "device": "GPU A", "cuda_over_triton": "1.1"}
            writer.writerow(entry)
    return folder


@pytest.mark.parametrize(
    ("cuda", "gpus", "expected"),
    [
        ("13000", "90", "cuda: CUDA C++ is 1.1 times as fast on GPU A: compiled library, CUDA "),
        ("13000", "", "cuda: "),  # the management library knows of none: a launch will tell
        ("13000", "90 80", "GPU 1 has compute capability 8.0, and the library needs 8.9"),
        ("12080", "90", "the driver serves CUDA 12.8, and the library needs 13.0"),
    ],
)
def test_what_serves_cuda_tensors_and_why(driver: Path, package: Path, cuda: str, gpus: str, expected: str) -> None:
    pytest.importorskip("triton")
    played = {"LD_LIBRARY_PATH": str(driver), "FAKE_CUDA": cuda, "FAKE_GPUS": gpus}
    code = f"import sys; sys.path.insert(0, {str(package)!r}); {PRINT}"
    result = python(code, CACHEDIT_KERNELS_BACKEND=None, TRITON_INTERPRET=None, **played)
    assert result.returncode == 0, result.stderr
    if expected.startswith("cuda: "):
        assert result.stdout.startswith(expected)
    else:
        assert result.stdout == f"triton: CUDA C++ would be faster, but {expected}\n"


def test_forced_cuda_names_what_is_wrong_with_the_driver(driver: Path) -> None:
    played = {"LD_LIBRARY_PATH": str(driver), "CACHEDIT_KERNELS_BACKEND": "cuda"}
    result = python(PRINT, FAKE_CUDA="12080", **played)
    assert "CACHEDIT_KERNELS_BACKEND=cuda, but the driver serves CUDA 12.8, and the library needs 13.0" in result.stderr
    result = python(PRINT, FAKE_CUDA="13010", **played)
    assert result.stdout.startswith("cuda: forced by CACHEDIT_KERNELS_BACKEND: compiled library, CUDA 13")
