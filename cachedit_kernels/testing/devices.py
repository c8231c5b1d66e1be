"""Where the tests of Triton kernels run: on a GPU by default, on CPU with TRITON_INTERPRET=1.

A kernel's test module parametrises its tests with `kernel_devices()` and carries one test that calls
`run_under_interpreter(__file__)`, so an ordinary pytest run has every test body run on CPU too, in a process of its
own: Triton decides at import whether it interprets, and a process that interprets can't compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreting = pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler; this process interprets")


def kernel_devices() -> list[Any]:
    """Parameters for a `device` argument."""
    if INTERPRETING:
        from cachedit_kernels.testing.interpreter import round_like_hardware

        round_like_hardware()
        return ["cpu"]
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return [pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]


def run_under_interpreter(module: str) -> None:
    """Runs a test module in a process that interprets Triton kernels on CPU, and fails if anything fails there."""
    import numpy as np
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy < 2.4, got {np.__version__}")
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", module]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(result.stdout[-4000:])
    if result.returncode != 0:
        pytest.fail(f"under the interpreter:\n{result.stdout[-8000:]}\n{result.stderr[-4000:]}", pytrace=False)
