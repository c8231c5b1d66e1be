"""Wheels: with the compiled library where there is a compiler, in pure Python and saying so where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import check_wheel
from operands import python

ROOT = Path(__file__).parents[2]
USE = """
import sys; sys.path.insert(0, {path!r})
import torch, cachedit_kernels as c
assert c.__file__.startswith({path!r})
print(c.backends()["l1"]["cpu"].implementation, c.l1([torch.ones(3)], [torch.zeros(3)]).tolist())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that nothing is built where others may be using it."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("csrc", "cachedit_kernels", "python", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    return copy


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def wheel(checkout: Path, out: Path, **environment: str) -> tuple[Path, str]:
    command = ("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(out), ".")
    log = run(*command, cwd=checkout, **environment)
    (file,) = out.glob("*.whl")
    return file, log


def has_compiler() -> bool:
    return any(map(shutil.which, ("c++", "g++", "clang++"))) and shutil.which("cmake") is not None


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler or no CMake")
def test_wheel_with_the_library(checkout: Path, tmp_path: Path) -> None:
    file, _ = wheel(checkout, tmp_path)
    has_cuda = shutil.which("nvcc") is not None
    library = check_wheel.library_in(file)
    assert check_wheel.problems(file.name, file.stat().st_size, library, cuda=has_cuda) == []
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"cachedit_kernels/_C.so", "cachedit_kernels/py.typed", "cachedit/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "python"))]
    data = [p for p in (ROOT / "python" / "cachedit").rglob("*") if p.suffix in (".safetensors", ".json", ".csv")]
    assert {str(p.relative_to(ROOT / "python")) for p in data} <= set(names)
    result = python(USE.format(path=str(tmp_path / "site")), CACHEDIT_KERNELS_BACKEND=None)
    assert result.stdout == "cpp [[3.0, 3.0]]\n", result.stderr


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler or no CMake")
def test_rebuilding_compiles_only_what_changed(checkout: Path) -> None:
    build = ("setup.py", "-q", "build_ext", "--inplace")
    run(*build, cwd=checkout)
    objects = {p: p.stat().st_mtime_ns for p in (checkout / "build" / "cpp").rglob("*.o")}
    assert len(objects) >= 6
    os.utime(checkout / "csrc" / "checks.cpp")
    run(*build, cwd=checkout)
    assert [p.name for p, time in objects.items() if p.stat().st_mtime_ns != time] == ["checks.cpp.o"]


def test_wheel_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    (checkout / "cachedit_kernels" / "_C.so").unlink(missing_ok=True)
    file, log = wheel(checkout, tmp_path, CXX="no-such-compiler")
    assert file.name.endswith("-py3-none-any.whl")
    assert log.count("cachedit-kernels: building without the C++ operators: no C++ compiler (no-such-compiler)") == 1
    with zipfile.ZipFile(file) as archive:
        assert "cachedit_kernels/_C.so" not in archive.namelist()
        archive.extractall(tmp_path / "site")
    result = python(USE.format(path=str(tmp_path / "site")), CACHEDIT_KERNELS_BACKEND=None)
    assert result.stdout == "reference [[3.0, 3.0]]\n" and result.stderr.count("RuntimeWarning") == 1
