"""Loads the compiled library, where there is one, and tells whether its CUDA kernels can run."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

# Not a Python extension module: it has no PyInit function, only operators registered through torch's stable ABI.
PATH = Path(__file__).with_name("_C.so")
CAPABILITY_VARIABLE = "CACHEDIT_CPU_CAPABILITY"
CAPABILITIES = ("default", "avx2", "avx512")
LOWEST_GPU = 89  # the CUDA kernels' PTX is for compute capability 8.9: CMakeLists.txt


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


def cuda() -> tuple[bool, str]:
    """Whether the library's CUDA kernels can run here and, in words, how or why not. Does not initialise CUDA."""
    loaded, reason = load()
    if not loaded:
        return False, reason
    library = ctypes.CDLL(str(PATH))
    if not hasattr(library, "cachedit_cuda_runtime_version"):
        return False, "the compiled library was built without nvcc"
    built = library.cachedit_cuda_runtime_version()
    driver = driver_version()
    if driver is None:
        return False, "there is no NVIDIA driver"
    # The CUDA runtime within works with every driver of its major version, and with later ones.
    if driver // 1000 < built // 1000:
        return False, f"the driver serves CUDA {_dotted(driver)}, and the library needs {built // 1000}.0"
    return True, f"compiled library, CUDA {_dotted(built)}, driver for {_dotted(driver)}"


def unserved_gpu() -> str | None:
    """In words, a GPU of this machine that is too old for the library's CUDA kernels. Does not initialise CUDA."""
    for index, capability in enumerate(gpu_capabilities()):
        if capability < LOWEST_GPU:
            return f"GPU {index} has compute capability {capability / 10}, and the library needs {LOWEST_GPU / 10}"
    return None


def register_cuda(overload: str, dispatch_key: str) -> None:
    """Puts the library's CUDA kernel behind an operator's overload."""
    if not ctypes.CDLL(str(PATH)).cachedit_cuda_register(overload.encode(), dispatch_key.encode()):
        raise RuntimeError(f"{PATH} has no CUDA kernel for {overload}")


def driver_version() -> int | None:
    """The latest CUDA that the driver serves, as 13000 for 13.0; None without a driver."""
    version = ctypes.c_int()
    try:
        found = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0
    except (OSError, AttributeError):
        return None
    return version.value if found else None


def gpu_capabilities() -> list[int]:
    """Compute capabilities of the machine's GPUs, as 89 for 8.9; empty where NVIDIA's library cannot tell."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return []
        count, handle, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        found = []
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
            for index in range(count.value):
                if (
                    nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0
                    and nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
                ):
                    found.append(10 * major.value + minor.value)
        nvml.nvmlShutdown()
        return found
    except (OSError, AttributeError):
        return []


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
