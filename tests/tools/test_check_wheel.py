"""The wheel's check: what it reads from a library agrees with other tools, and what it refuses."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import check_wheel
import elf
from cachedit_kernels import _native

needs_library = pytest.mark.skipif(not _native.PATH.exists(), reason="needs the compiled library")


def fat_binary(*entries: tuple[int, int, int]) -> bytes:
    """Entries of (kind, architecture, flags), each with eight bytes of code."""
    body = b"".join(
        struct.pack("<HHIQIIHHIIIQQQ", kind, 0x101, 64, 8, 0, 0, 8, 1, architecture, 0, 0, flags, 0, 0) + bytes(8)
        for kind, architecture, flags in entries
    )
    return struct.pack("<IHHQ", check_wheel.FATBIN_MAGIC, 1, 16, len(body)) + body


PTX, CUBIN, SPECIFIC = check_wheel.PTX, check_wheel.CUBIN, check_wheel.ARCHITECTURE_SPECIFIC
WHOLE = ((PTX, 89, 0x11), (CUBIN, 89, 0x11), (CUBIN, 90, 0x11 | SPECIFIC))
NAME = "cachedit_kernels-0.1.0-cp310-abi3-manylinux_2_34_x86_64.whl"


def library(
    *entries: tuple[int, int, int],
    needed: tuple[str, ...] = ("libtorch_cpu.so", "libc.so.6"),
    glibc: str = "GLIBC_2.34",
    libstdcxx: str = "GLIBCXX_3.4.29",
    undefined: tuple[str, ...] = ("aoti_torch_get_dim", "_ZNSt13runtime_errorD1Ev"),
) -> elf.Library:
    sections = {".nv_fatbin": fat_binary(*entries) + bytes(8) + fat_binary(*entries)} if entries else {}
    versions = {"libc.so.6": ("GLIBC_2.2.5", glibc), "libstdc++.so.6": ("CXXABI_1.3", libstdcxx)}
    return elf.Library(62, sections, needed, versions, undefined, ())


def test_a_good_wheel_passes() -> None:
    assert check_wheel.problems(NAME, 5_000_000, library(*WHOLE), cuda=True) == []
    assert check_wheel.problems(NAME, 5_000_000, library(), cuda=False) == []


@pytest.mark.parametrize(
    ("made", "nbytes", "problem"),
    [
        (None, 1, "there is no cachedit_kernels/_C.so"),
        (library(*WHOLE), 15_000_000, "the size must be below 15 MB, got 15.0 MB"),
        (library(*WHOLE, glibc="GLIBC_2.36"), 1, "the name must end in cp310-abi3-manylinux_2_36_x86_64"),
        (library(*WHOLE, needed=("libcudart.so.13",)), 1, "linked to libcudart.so.13"),
        (library(*WHOLE, needed=("libtorch_cuda.so",)), 1, "linked to libtorch_cuda.so"),
        (library(*WHOLE, undefined=("_ZN2at6Tensor3sumEv",)), 1, "needs C++ of libtorch: _ZN2at6Tensor3sumEv"),
        (library(*WHOLE, undefined=("_ZNK3c106Device3strEv",)), 1, "needs C++ of libtorch: _ZNK3c106Device3strEv"),
        (library(*WHOLE, undefined=("PyObject_Call",)), 1, "needs Python: PyObject_Call"),
        (library(*WHOLE[:2]), 1, "there is no machine code for sm_90a"),
        (library(*WHOLE[:2], (CUBIN, 90, 0)), 1, "there is no machine code for sm_90a"),
        (library(*WHOLE[1:]), 1, "there is no PTX for later chips"),
        (library(*WHOLE, (PTX, 90, SPECIFIC)), 1, "compute_90a PTX runs on no later chip"),
    ],
)
def test_each_fault_is_refused(made: elf.Library | None, nbytes: int, problem: str) -> None:
    (found,) = check_wheel.problems(NAME, nbytes, made, cuda=True)
    assert found.startswith(problem)


def test_a_cpu_wheel_holds_no_cuda() -> None:
    found = check_wheel.problems(NAME, 1, library(*WHOLE), cuda=False)
    assert found == [f"holds {a} in a wheel for CPUs" for a in ("compute_89", "sm_89", "sm_90a")]


@pytest.mark.parametrize(
    ("glibc", "libstdcxx", "tag"),
    [
        ("GLIBC_2.34", "GLIBCXX_3.4.21", "manylinux_2_34_x86_64"),
        ("GLIBC_2.9", "GLIBCXX_3.4.21", "manylinux_2_24_x86_64"),  # 2.9 is older than 2.24
        ("GLIBC_2.28", "GLIBCXX_3.4.30", "manylinux_2_35_x86_64"),
    ],
)
def test_the_tag_is_the_oldest_that_has_both_libraries(glibc: str, libstdcxx: str, tag: str) -> None:
    assert elf.platform_tag(library(glibc=glibc, libstdcxx=libstdcxx)) == tag


def test_what_is_no_library_is_refused() -> None:
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        elf.parse(b"MZ" + bytes(100))
    with pytest.raises(ValueError, match=r"GLIBCXX_3\.4\.99 is newer than every known manylinux policy"):
        elf.platform_tag(library(libstdcxx="GLIBCXX_3.4.99"))


@needs_library
@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_what_is_read_agrees_with_readelf() -> None:
    found = elf.read(_native.PATH)
    told = subprocess.run(["readelf", "-dVW", "--dyn-syms", _native.PATH], capture_output=True, text=True).stdout
    assert set(found.needed) == set(re.findall(r"Shared library: \[(.*?)\]", told))
    names = {name for names in found.versions.values() for name in names}
    assert names == set(re.findall(r"Name: (\S+)  Flags", told))
    symbols = {name.split("@")[0] for name in re.findall(r" UND (\S+)", told)}
    assert set(found.undefined) == symbols and "aoti_torch_get_dim" in symbols
    glibc = max(tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_(2\.\d+)", told))
    assert elf.glibc_version(found) == glibc
    assert not [problem for problem in check_wheel.problems(NAME, 1, found, cuda=True) if "libtorch" in problem]


@needs_library
def test_the_cuda_code_found_agrees_with_cuobjdump() -> None:
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = sorted(code.architecture for code in check_wheel.cuda_code(elf.read(_native.PATH)))
    if not found or not cuobjdump.exists():
        pytest.skip("built without nvcc, or this Triton has no cuobjdump")
    command = [cuobjdump, "--list-elf", "--list-ptx", _native.PATH]
    listed = re.findall(r"\.(sm_\w+)\.(cubin|ptx)", subprocess.run(command, capture_output=True, text=True).stdout)
    assert found == sorted(name if kind == "cubin" else name.replace("sm_", "compute_") for name, kind in listed)
