"""Makes Triton's interpreter round as the hardware does; import it in a process that has TRITON_INTERPRET=1.

As shipped (Triton 3.6.0 and 3.7.1) the interpreter truncates fp32 to bf16 and drops the carry of fp8 mantissas. Here
both go through torch: nearest even, and fp8 saturating. Arithmetic on bf16 stays wrong there, so kernels widen first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH_DTYPE = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_STORAGE_DTYPE = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
_original = interpreter._convert_float


def round_like_hardware() -> None:
    """Patches the interpreter of this process; calling it again changes nothing."""
    interpreter._convert_float = _convert_float


def _convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    if source not in _TORCH_DTYPE or target not in _TORCH_DTYPE:
        return _original(values, source, target, rounding_mode)
    bits = np.ascontiguousarray(values).view(_numpy_integer(source.primitive_bitwidth)).copy()
    x = torch.from_numpy(bits).view(_TORCH_DTYPE[source]).float()
    if target.primitive_bitwidth == 8:
        limit = torch.finfo(_TORCH_DTYPE[target]).max
        x = torch.where(x.isnan(), x, x.clamp(-limit, limit))
    width = target.primitive_bitwidth
    rounded = x.to(_TORCH_DTYPE[target]).view(_STORAGE_DTYPE[width]).numpy()
    return rounded.view(f"uint{width}").reshape(values.shape)


def _numpy_integer(width: int) -> str:
    return "uint8" if width == 8 else f"int{width}"
