"""Packaging. What is compiled, and how, is in CMakeLists.txt; this file only calls CMake and names the result.

Without a C++ compiler (or CMake) the package is built in pure Python and says so. CUDA kernels are built where nvcc is
found; the environment variable CACHEDIT_CUDA=ON makes it an error to have none, CACHEDIT_CUDA=OFF leaves them out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import elf  # noqa: E402


def missing_for_cpp() -> str | None:
    """What keeps the C++ operators from being built, or None."""
    if not sys.platform.startswith(("linux", "darwin")):
        return f"not supported on {sys.platform} yet"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler ({', '.join(compilers)})"
    if shutil.which("cmake") is None:
        return "no CMake"
    if importlib.util.find_spec("torch") is None:
        return "no torch in the environment that builds"
    return None


class CMakeBuild(build_ext):
    """Builds cachedit_kernels/_C.so; always through CMake, which knows what is up to date."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # a plain library: no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / "cpp"  # kept between builds, unlike self.build_temp
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCACHEDIT_CUDA={os.environ.get('CACHEDIT_CUDA', 'AUTO')}",
        ]
        if ninja := shutil.which("ninja"):  # named each time: an isolated build's ninja is gone the next time
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old library mapped keeps it.
        new = target.with_suffix(".new")
        shutil.copyfile(build / "_C.so", new)
        os.replace(new, target)


class TaggedWheel(bdist_wheel):
    """Names the wheel by the glibc that the library in it needs, rather than by the machine that builds."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        library = Path(self.bdist_dir or "", "cachedit_kernels", "_C.so")
        if platform.startswith("linux") and library.exists():
            platform = elf.platform_tag(elf.read(library))
        return python, abi, platform


reason = missing_for_cpp()
if reason and {"bdist_wheel", "editable_wheel", "build", "build_ext", "install"} & set(sys.argv):
    print(f"cachedit-kernels: building without the C++ operators: {reason}", file=sys.stderr)

setup(
    packages=[
        *find_packages(include=["cachedit_kernels", "cachedit_kernels.*"]),
        *find_packages("python", include=["cachedit", "cachedit.*"]),
    ],
    package_dir={"cachedit": "python/cachedit"},
    package_data={
        "cachedit_kernels": ["py.typed", "cuda_defaults.csv"],
        "cachedit": ["py.typed", "embedded/*.safetensors", "embedded/*.json", "embedded/*.csv", "embedded/*.md"]
        + [f"embedded/**/*.{suffix}" for suffix in ("safetensors", "json", "csv", "md")],
    },
    include_package_data=False,
    # py_limited_api names the wheel cp310-abi3: the library does not depend on the Python version at all.
    ext_modules=[] if reason else [Extension("cachedit_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": TaggedWheel},
    options={} if reason else {"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
