"""Rows in E4M3 for Triton kernels: the scale of a row, and its codes, as float8/reference.py defines them."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions as its own types.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.jit
def row_magnitudes(x):
    """The largest |x| of each row of x [ROWS, COLUMNS], NaN left out."""
    return tl.max(tl.where(x == x, tl.abs(x), 0.0), axis=1)


@triton.jit
def row_scales(magnitudes):
    """The scales of rows, from their largest magnitudes."""
    scale = tl.div_rn(magnitudes, 448.0)
    # The smallest normal number: rows of zeros divide like others.
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@triton.jit
def row_codes(x, scales):
    """x [ROWS, COLUMNS] as codes. Before sm_90 the conversion passes through fp16, which would round twice."""
    x = tl.div_rn(x, tl.broadcast_to(scales[:, None], x.shape))
    x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))  # NaN stays
    if not cuda_capability_geq(9):
        x = _round_to_e4m3(x)
    return x.to(tl.float8e4nv)


@triton.jit
def _round_to_e4m3(x):
    """x, |x| <= 448 or NaN, rounded to the nearest E4M3 number, to even between two; still in fp32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    normal = ((bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Neighbours beyond 2^14 are 2^-9 apart, as subnormal E4M3 numbers are.
    subnormal = ((magnitude + 16384.0) - 16384.0).to(tl.int32, bitcast=True)
    rounded = tl.where(magnitude < 0.015625, subnormal, normal) | (bits & -0x80000000)
    rounded = rounded.to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)
