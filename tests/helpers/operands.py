"""Tensors to test operators with: every dtype, shape and layout that they must read rightly."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Around the kernels' vectors and groups (4 to 32 elements), blocks (2048) and chunks (16384).
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 65, 127, 2047, 2048, 2049, 16383, 16384, 16385, 36001)
SHAPES = (
    *((n,) for n in LENGTHS),
    (),
    (0,),
    (3, 0, 4),
    (0, 5),
    (1, 1),
    (2, 3),
    (1, 77, 8),
    (2, 33, 129),
    (3, 2, 8200),
    (2, 1, 16384),
    (700, 3),
    (2, 3, 5, 7, 11),
)
LAYOUTS = (
    "contiguous",
    "batch slice",
    "token slice",
    "column slice",
    "every second",
    "transposed",
    "expanded",
    "offset",
)

shapes = st.one_of(st.sampled_from(SHAPES), st.lists(st.integers(0, 9), max_size=5).map(tuple))
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**31)


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Normal numbers of the given shape in the given layout, as far as the shape allows it; gaps hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    values = random(*shape)
    if layout == "expanded" and shape:
        return random(*shape[:-1], 1).expand(shape) if seed % 2 else random(*shape[1:]).expand(shape)
    if layout == "transposed" and len(shape) >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    outer = {  # what the values are a slice of
        "batch slice": (shape[0] + 1, *shape[1:]) if shape else None,
        "token slice": (shape[0], shape[1] + 3, *shape[2:]) if len(shape) >= 2 else None,
        "column slice": (*shape[:-1], shape[-1] + 2) if shape else None,
        "every second": (*shape[:-1], 2 * shape[-1]) if shape else None,
        "offset": (5, *shape),
    }.get(layout)
    if outer is None:
        return values
    whole = torch.full(outer, torch.nan, dtype=dtype)
    if layout == "every second":
        view = whole[..., ::2]
    elif layout == "offset":
        view = whole[3]
    else:
        view = whole[tuple(slice(size) for size in shape)]
    view.copy_(values)
    return view


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter; an environment variable given as None is removed."""
    env = dict(os.environ, **{name: value for name, value in environment.items() if value is not None})
    for name in (name for name, value in environment.items() if value is None):
        env.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
