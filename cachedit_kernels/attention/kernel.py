"""Triton kernel that merges partial attention results: `merge_attention`.

The launch function carries the operator's name and takes checked tensors of any strides.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions as its own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachedit_kernels.launch import leading_strides, on_device_of, with_adjacent_columns

NUM_WARPS = 4
BYTES_PER_THREAD = 32  # of each result that a program reads: two 16-byte accesses


@triton.jit
def _offset(b, l, h, b_stride, l_stride, h_stride):  # noqa: E741 (l as in [B, L, H])
    return b.to(tl.int64) * b_stride + l.to(tl.int64) * l_stride + h.to(tl.int64) * h_stride


# Numbers in tuples are always specialised on, so the strides that no wide access depends on come one by one.
@triton.jit(do_not_specialize=["rows", "length", "heads", "lse_b", "lse_l", "lse_h", "lse2_b", "lse2_l", "lse2_h"])
def _merge_attention_kernel(
    out,
    out2,
    lse,
    lse2,
    merged,
    merged_lse,
    rows,
    length,
    heads,
    out_strides,
    out2_strides,
    lse_b,
    lse_l,
    lse_h,
    lse2_b,
    lse2_l,
    lse2_h,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """merged = w * out + w2 * out2 with w : w2 = exp(lse) : exp(lse2), and merged_lse = log(exp(lse) + exp(lse2)).

    A row is a token and head. A program merges ROWS of them, the COLUMNS >= HEAD_DIM of each at once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    token = row // heads
    h = row % heads
    b = token // length
    l = token % length  # noqa: E741
    x = tl.load(lse + _offset(b, l, h, lse_b, lse_l, lse_h), mask=inside, other=0.0)
    y = tl.load(lse2 + _offset(b, l, h, lse2_b, lse2_l, lse2_h), mask=inside, other=0.0)
    EMPTY: tl.constexpr = float("-inf")

    first = x >= y
    top = tl.where(first, x, y)
    decay = tl.where((x == EMPTY) & (y == EMPTY), 0.0, tl.exp(-tl.abs(x - y)))  # NaN where x or y is
    total = 1.0 + decay
    larger = 1.0 / total
    smaller = decay / total
    weight = tl.where(x == EMPTY, 0.0, tl.where(first, larger, smaller))[:, None]
    weight2 = tl.where(y == EMPTY, 0.0, tl.where(first, smaller, larger))[:, None]
    # log1p(decay): the second term is what adding 1 has rounded away.
    log_total = tl.log(total) + (decay - (total - 1.0)) / total
    tl.store(merged_lse + row, top + log_total, mask=inside)

    column = tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < HEAD_DIM)
    # A zero switches loads off through their mask.
    source = out + _offset(b, l, h, out_strides[0], out_strides[1], out_strides[2])[:, None] + column
    source2 = out2 + _offset(b, l, h, out2_strides[0], out2_strides[1], out2_strides[2])[:, None] + column
    value = tl.load(source, mask=mask & (weight != 0.0), other=0.0).to(tl.float32) * weight
    value += tl.load(source2, mask=mask & (weight2 != 0.0), other=0.0).to(tl.float32) * weight2
    target = merged + row.to(tl.int64)[:, None] * HEAD_DIM + column
    tl.store(target, value.to(merged.dtype.element_ty), mask=mask)


def merge_attention(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax-weighted mean of both results and its lse, as new contiguous tensors of `out`'s and `lse`'s dtype."""
    batch, length, heads, head_dim = out.shape
    merged = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    merged_lse = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    rows = batch * length * heads
    if rows == 0:
        return merged, merged_lse
    out, out2 = with_adjacent_columns(out), with_adjacent_columns(out2)
    columns = triton.next_power_of_2(max(head_dim, 1))
    block = 32 * NUM_WARPS * BYTES_PER_THREAD // max(out.element_size(), out2.element_size())
    rows_per_program = max(1, block // columns)
    with on_device_of(out):
        _merge_attention_kernel[(triton.cdiv(rows, rows_per_program),)](
            out,
            out2,
            lse,
            lse2,
            merged,
            merged_lse,
            rows,
            length,
            heads,
            leading_strides(out),
            leading_strides(out2),
            *leading_strides(lse),
            *leading_strides(lse2),
            HEAD_DIM=head_dim,
            ROWS=rows_per_program,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )
    return merged, merged_lse
