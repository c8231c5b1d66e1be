"""Reads what a wheel's check asks of a shared library: 64-bit little-endian ELF, in plain Python."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

UNDEFINED = 0  # the section of symbols that a library does not define itself
DT_NEEDED = 1
MACHINES = {62: "x86_64", 183: "aarch64"}
# The oldest glibc of the manylinux policies that comes with a libstdc++ of GLIBCXX_3.4.x, by x.
GLIBC_OF_LIBSTDCXX = ((19, 17), (22, 24), (24, 27), (28, 31), (29, 34), (30, 35), (32, 38), (33, 39))


class Library(NamedTuple):
    machine: int  # key of MACHINES
    sections: dict[str, bytes]
    needed: tuple[str, ...]  # libraries that it is linked to
    versions: dict[str, tuple[str, ...]]  # what it asks of each of them: {"libc.so.6": ("GLIBC_2.14", ...)}
    undefined: tuple[str, ...]  # symbols that others must define
    defined: tuple[str, ...]  # symbols that others may see


def read(path: Path) -> Library:
    return parse(path.read_bytes())


def parse(data: bytes) -> Library:
    """Raises ValueError where the bytes are not such a library."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", data, 18)
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * entry_size) for i in range(count)]
    names = _content(data, headers[names_index])
    sections = {_string(names, header[0]): _content(data, header) for header in headers}
    strings = sections.get(".dynstr", b"")
    dynamic = struct.iter_unpack("<QQ", sections.get(".dynamic", b""))
    symbols = list(struct.iter_unpack("<IBBHQQ", sections.get(".dynsym", b"")))[1:]
    return Library(
        machine,
        sections,
        tuple(_string(strings, value) for tag, value in dynamic if tag == DT_NEEDED),
        _versions(sections.get(".gnu.version_r", b""), strings),
        tuple(_string(strings, symbol[0]) for symbol in symbols if symbol[3] == UNDEFINED),
        tuple(_string(strings, symbol[0]) for symbol in symbols if symbol[3] != UNDEFINED),
    )


def glibc_version(library: Library) -> tuple[int, int]:
    """The highest version of glibc that the library asks for; (0, 0) if none."""
    asked = [version for versions in library.versions.values() for version in versions]
    numbers = [version.removeprefix("GLIBC_") for version in asked if version.startswith("GLIBC_2.")]
    return max(((int(major), int(minor)) for major, minor, *_ in (n.split(".") for n in numbers)), default=(0, 0))


def _content(data: bytes, header: tuple[int, ...]) -> bytes:
    _, kind, _, _, offset, size = header
    return b"" if kind == 8 else data[offset : offset + size]  # 8: takes no room in the file


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()


def _versions(section: bytes, strings: bytes) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    at = 0
    while section:
        _, count, file, first, following = struct.unpack_from("<HHIII", section, at)
        names, entry = [], at + first
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", section, entry)
            names.append(_string(strings, name))
            entry += step
        found[_string(strings, file)] = tuple(names)
        if following == 0:
            break
        at += following
    return found


def platform_tag(library: Library) -> str:
    """The oldest manylinux that has the glibc and libstdc++ which the library asks for, as a wheel's name has it."""
    asked = {version for versions in library.versions.values() for version in versions}
    newest = max((int(v.split(".")[2]) for v in asked if v.startswith("GLIBCXX_3.4.")), default=0)
    fitting = [glibc for libstdcxx, glibc in GLIBC_OF_LIBSTDCXX if libstdcxx >= newest]
    if not fitting:
        raise ValueError(f"GLIBCXX_3.4.{newest} is newer than every known manylinux policy")
    major, minor = max(glibc_version(library), (2, fitting[0]))
    return f"manylinux_{major}_{minor}_{MACHINES[library.machine]}"
