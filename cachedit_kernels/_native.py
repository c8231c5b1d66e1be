"""Loads the compiled library, where there is one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

# Not a Python extension module: it has no PyInit function, only operators registered through torch's stable ABI.
PATH = Path(__file__).with_name("_C.so")
CAPABILITY_VARIABLE = "CACHEDIT_CPU_CAPABILITY"
CAPABILITIES = ("default", "avx2", "avx512")


def load() -> tuple[bool, str]:
    """Whether the library is loaded and, in words, how or why not. Loading registers the C++ operators for CPU."""
    wanted = os.environ.get(CAPABILITY_VARIABLE)
    if wanted is not None and wanted not in CAPABILITIES:
        raise RuntimeError(f"{CAPABILITY_VARIABLE} must be one of {', '.join(CAPABILITIES)}, got {wanted!r}")
    if not PATH.exists():
        return False, f"there is no {PATH.name} in {PATH.parent}"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return False, f"{PATH} does not load: {error}"
    capability = ctypes.CDLL(str(PATH)).cachedit_cpu_capability
    capability.restype = ctypes.c_char_p
    return True, f"compiled library, {capability().decode()} kernels"
