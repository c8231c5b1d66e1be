"""Reads out of a wheel what it needs and what it brings, and refuses what would not run elsewhere.

    python tools/check_wheel.py [--cpu] WHEEL

`--cpu` is for a wheel that was built without nvcc. Needs nothing but Python. docs/wheels.md explains the rules.
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import elf

LIBRARY = "cachedit_kernels/_C.so"
MEGABYTES = 15
MACHINE_CODE = {"sm_89", "sm_90a"}  # Ada and Hopper need no compiler at run time
ALLOWED = re.compile(r"lib(torch_cpu|stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so|ld-linux")
# Mangled names in torch's C++ namespaces: their ABI changes from release to release.
TORCH_CPP = re.compile(r"_ZN[KVO]*(2at|3c10|5torch|5caffe2)|_ZT[ISV]N?(2at|3c10|5torch)")

FATBIN_MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2  # kinds of entries
ARCHITECTURE_SPECIFIC = 1 << 20  # a flag of an entry: the "a" of sm_90a


class Code(NamedTuple):
    """What CUDA finds in the library: `sm_90a` machine code, or `compute_89` PTX to compile."""

    architecture: str
    nbytes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cpu", action="store_true", help="expect no CUDA kernels")
    arguments = parser.parse_args()
    library = library_in(arguments.wheel)
    print(f"{arguments.wheel.name}: {arguments.wheel.stat().st_size / 1e6:.2f} MB")
    if library is not None:
        glibc = ".".join(map(str, elf.glibc_version(library)))
        print(f"needs {', '.join(library.needed)}; glibc {glibc}, so {elf.platform_tag(library)}")
        for code in cuda_code(library):
            print(f"holds {code.architecture}, {code.nbytes} bytes")
    found = problems(arguments.wheel.name, arguments.wheel.stat().st_size, library, cuda=not arguments.cpu)
    for problem in found:
        print(f"REFUSED: {problem}", file=sys.stderr)
    return bool(found)


def library_in(wheel: Path) -> elf.Library | None:
    with zipfile.ZipFile(wheel) as archive:
        return elf.parse(archive.read(LIBRARY)) if LIBRARY in archive.namelist() else None


def problems(name: str, nbytes: int, library: elf.Library | None, cuda: bool) -> list[str]:
    """What is wrong with a wheel of this name and size with this library in it; `cuda`: it must hold CUDA kernels."""
    if library is None:
        return [f"there is no {LIBRARY}"]
    found = []
    tag = f"cp310-abi3-{elf.platform_tag(library)}"
    if not name.endswith(f"-{tag}.whl"):
        found.append(f"the name must end in {tag}, got {name}")
    if nbytes >= MEGABYTES * 1e6:
        found.append(f"the size must be below {MEGABYTES} MB, got {nbytes / 1e6:.1f} MB")
    found += [f"linked to {other}" for other in library.needed if not ALLOWED.match(other)]
    found += [f"needs C++ of libtorch: {symbol}" for symbol in library.undefined if TORCH_CPP.match(symbol)]
    found += [f"needs Python: {symbol}" for symbol in library.undefined if re.match(r"_?Py[A-Z_]", symbol)]
    held = {code.architecture for code in cuda_code(library)}
    if not cuda:
        return found + [f"holds {architecture} in a wheel for CPUs" for architecture in sorted(held)]
    found += [f"there is no machine code for {architecture}" for architecture in sorted(MACHINE_CODE - held)]
    ptx = {architecture for architecture in held if architecture.startswith("compute_")}
    found += [f"{architecture} PTX runs on no later chip" for architecture in sorted(ptx) if architecture.endswith("a")]
    if not ptx:
        found.append("there is no PTX for later chips")
    return found


def cuda_code(library: elf.Library) -> Iterator[Code]:
    """The entries of all fat binaries, one after the other; their headers are as cuobjdump lists them."""
    section = library.sections.get(".nv_fatbin", b"")
    at = 0
    while at + 16 <= len(section):
        magic, _, header, size = struct.unpack_from("<IHHQ", section, at)
        if magic != FATBIN_MAGIC:
            at += 8  # filling
            continue
        entry, at = at + header, at + header + size
        while entry < at:
            kind, _, header, nbytes = struct.unpack_from("<HHIQ", section, entry)
            (number,) = struct.unpack_from("<I", section, entry + 28)
            (flags,) = struct.unpack_from("<Q", section, entry + 40)
            if kind in (PTX, CUBIN):
                suffix = "a" if flags & ARCHITECTURE_SPECIFIC else ""
                yield Code(f"{'compute' if kind == PTX else 'sm'}_{number}{suffix}", nbytes)
            entry += header + nbytes


if __name__ == "__main__":
    sys.exit(main())
