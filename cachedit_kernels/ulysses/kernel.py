"""Triton kernels that pack tensors for an all-to-all and unpack them: `ulysses_pack`, `ulysses_unpack`.

The launch functions carry the operators' names and take checked tensors of any strides. All tensors and all peers go
out in one launch. Where things lie is told by layout.py; the kernels work it out from a block's shape alone, as all
tensors of a call have one shape.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of its functions as its own types.

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachedit_kernels.float8.kernel import row_codes, row_magnitudes, row_scales
from cachedit_kernels.launch import leading_strides, on_device_of, with_adjacent_columns
from cachedit_kernels.ulysses.layout import ALIGNMENT, Block, buffer_bytes, layout

NUM_WARPS = 4
ELEMENTS_PER_THREAD = 16  # their codes are one 16-byte access


@triton.jit
def _aligned(nbytes):
    return tl.cdiv(nbytes, 16) * 16


@triton.jit
def _fill_section(buffer, offset, nbytes):
    """Zeros from a section's end to the next one's start."""
    lanes = tl.arange(0, 16)
    tl.store(buffer + (offset + nbytes) + lanes, tl.zeros([16], tl.uint8), mask=lanes < _aligned(nbytes) - nbytes)


@triton.jit
def _block(peers, batch, length, heads, DIM: tl.constexpr):
    """This program's peer: its block's length and heads, where they start, the block's rows, its offset in bytes."""
    numbers = peers + 3 * tl.program_id(1)
    start = tl.load(numbers).to(tl.int32)
    size = tl.load(numbers + 1).to(tl.int32)
    offset = tl.load(numbers + 2) * 16
    if DIM == 1:
        return size, heads, start, 0, batch * size * heads, offset
    else:
        return length, size, 0, start, batch * length * size, offset


@triton.jit
def _offsets(row, length, heads, l_start, h_start, strides):
    """Where the block's rows begin in a tensor of the given strides, in elements."""
    token = row // heads
    b = (token // length).to(tl.int64)
    l = (token % length + l_start).to(tl.int64)  # noqa: E741 (as in [B, L, H, D])
    h = (row % heads + h_start).to(tl.int64)
    return b * strides[0] + l * strides[1] + h * strides[2]


@triton.jit(do_not_specialize=["batch", "length", "heads"])
def _pack_kernel(
    quantised,
    plain,
    quantised_strides,
    plain_strides,
    buffer,
    codes,
    elements,
    scales,
    peers,
    batch,
    length,
    heads,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ELEMENT_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per row (token and head): E4M3 codes and their scale; or the elements as they are.

    `codes`, `elements` and `scales` are the buffer itself, as pointers of their types. `peers` holds per peer where it
    starts along DIM, its size, and its block's offset / 16. The grid is (tiles of the largest block, peers, tensors); a
    program takes ROWS rows of the block, the COLUMNS >= HEAD_DIM of each at once.
    """
    block_length, block_heads, l_start, h_start, rows, offset = _block(peers, batch, length, heads, DIM)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < HEAD_DIM)
    place = row.to(tl.int64)[:, None] * HEAD_DIM + column  # of the elements within their section
    numel = rows.to(tl.int64) * HEAD_DIM
    first_plain = offset + len(quantised) * _aligned(numel)
    first_scales = first_plain + len(plain) * _aligned(numel * ELEMENT_SIZE)
    if tl.program_id(0) * ROWS < rows:
        for i in tl.static_range(len(quantised)):
            if tl.program_id(2) == i:
                source = _offsets(row, block_length, block_heads, l_start, h_start, quantised_strides[i])
                x = tl.load(quantised[i] + source[:, None] + column, mask=mask, other=0.0).to(tl.float32)
                scale = row_scales(row_magnitudes(x))
                values_at = offset + i * _aligned(numel)
                scales_at = first_scales + i * _aligned(rows.to(tl.int64) * 4)
                tl.store(codes + values_at + place, row_codes(x, scale), mask=mask)
                tl.store(scales + scales_at // 4 + row, scale, mask=inside)
                if tl.program_id(0) == 0:
                    _fill_section(buffer, values_at, numel)
                    _fill_section(buffer, scales_at, rows.to(tl.int64) * 4)
        for j in tl.static_range(len(plain)):
            if tl.program_id(2) == len(quantised) + j:
                source = _offsets(row, block_length, block_heads, l_start, h_start, plain_strides[j])
                x = tl.load(plain[j] + source[:, None] + column, mask=mask)
                values_at = first_plain + j * _aligned(numel * ELEMENT_SIZE)
                tl.store(elements + values_at // ELEMENT_SIZE + place, x, mask=mask)
                if tl.program_id(0) == 0:
                    _fill_section(buffer, values_at, numel * ELEMENT_SIZE)


@triton.jit(do_not_specialize=["batch", "length", "heads"])
def _unpack_kernel(
    quantised,
    quantised_scales,
    plain,
    codes,
    elements,
    scales,
    peers,
    batch,
    length,
    heads,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ELEMENT_SIZE: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per row: code * scale in fp32, rounded once, or codes and scales as they are; the grid is that of packing.

    The results are contiguous [batch, length, heads, HEAD_DIM]; `quantised_scales` is empty with DEQUANTIZE.
    """
    block_length, block_heads, l_start, h_start, rows, offset = _block(peers, batch, length, heads, DIM)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < HEAD_DIM)
    place = row.to(tl.int64)[:, None] * HEAD_DIM + column
    numel = rows.to(tl.int64) * HEAD_DIM
    first_plain = offset + len(quantised) * _aligned(numel)
    first_scales = first_plain + len(plain) * _aligned(numel * ELEMENT_SIZE)
    if tl.program_id(0) * ROWS < rows:
        strides = (length * heads, heads, 1)  # of rows
        target = _offsets(row, block_length, block_heads, l_start, h_start, strides)
        targets = target[:, None] * HEAD_DIM + column
        for i in tl.static_range(len(quantised)):
            if tl.program_id(2) == i:
                code = tl.load(codes + (offset + i * _aligned(numel)) + place, mask=mask)
                scales_at = first_scales + i * _aligned(rows.to(tl.int64) * 4)
                scale = tl.load(scales + scales_at // 4 + row, mask=inside)
                if DEQUANTIZE:
                    x = code.to(tl.float32) * scale[:, None]
                    tl.store(quantised[i] + targets, x.to(quantised[i].dtype.element_ty), mask=mask)
                else:
                    tl.store(quantised[i] + targets, code, mask=mask)
                    tl.store(quantised_scales[i] + target, scale, mask=inside)
        for j in tl.static_range(len(plain)):
            if tl.program_id(2) == len(quantised) + j:
                values_at = first_plain + j * _aligned(numel * ELEMENT_SIZE)
                x = tl.load(elements + values_at // ELEMENT_SIZE + place, mask=mask)
                tl.store(plain[j] + targets, x, mask=mask)


def ulysses_pack(tensors: Sequence[Tensor], splits: Sequence[int], scatter_dim: int, float8: Sequence[bool]) -> Tensor:
    """One uint8 buffer with a block for each peer."""
    like = tensors[0]
    blocks = layout(like.shape, splits, scatter_dim, like.element_size(), float8)
    buffer = torch.empty(buffer_bytes(blocks), dtype=torch.uint8, device=like.device)
    _launch_pack(tensors, blocks, scatter_dim, float8, buffer)
    return buffer


def ulysses_pack_into(
    tensors: Sequence[Tensor],
    splits: Sequence[int],
    scatter_dim: int,
    float8: Sequence[bool],
    buffers: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    """The same blocks in the same launch, each in a buffer of its own: peer p's at byte `offsets[p]` of `buffers[p]`.

    Buffers are uint8, not empty, and this device can write to them; they and the offsets are aligned to 16 bytes. The
    kernel is not aware of it: all addresses are told as distances from the first buffer.
    """
    like = tensors[0]
    blocks = layout(like.shape, splits, scatter_dim, like.element_size(), float8)
    base = buffers[0].data_ptr()
    placed = tuple(
        block._replace(offset=buffer.data_ptr() + offset - base)
        for block, buffer, offset in zip(blocks, buffers, offsets, strict=True)
    )
    _launch_pack(tensors, placed, scatter_dim, float8, buffers[0])


def _launch_pack(
    tensors: Sequence[Tensor], blocks: tuple[Block, ...], scatter_dim: int, float8: Sequence[bool], buffer: Tensor
) -> None:
    """Writes each block at its offset from the buffer's start."""
    if buffer_bytes(blocks) == 0:
        return
    like = tensors[0]
    ready = [with_adjacent_columns(tensor) for tensor in tensors]
    quantised = tuple(tensor for tensor, is_quantised in zip(ready, float8, strict=True) if is_quantised)
    plain = tuple(tensor for tensor, is_quantised in zip(ready, float8, strict=True) if not is_quantised)
    grid, sizes = _tiles(blocks, len(tensors))
    with on_device_of(like):
        _pack_kernel[grid](
            quantised,
            plain,
            tuple(leading_strides(tensor) for tensor in quantised),
            tuple(leading_strides(tensor) for tensor in plain),
            buffer,
            *_views(buffer, like.dtype),
            _peers(blocks, scatter_dim, like.device),
            *like.shape[:3],
            DIM=scatter_dim,
            HEAD_DIM=like.shape[3],
            ELEMENT_SIZE=like.element_size(),
            **sizes,
        )


def ulysses_unpack(
    buffer: Tensor,
    shape: Sequence[int],
    splits: Sequence[int],
    gather_dim: int,
    dtype: torch.dtype,
    float8: Sequence[bool],
    dequantize: bool = True,
) -> list[Tensor]:
    """The tensors; in place of each quantised one its codes and scales, where they are to stay as they are."""
    device = buffer.device
    blocks = layout(shape, splits, gather_dim, dtype.itemsize, float8)
    quantised_dtype = dtype if dequantize else torch.float8_e4m3fn
    values = [torch.empty(*shape, dtype=quantised_dtype if q else dtype, device=device) for q in float8]
    quantised = tuple(tensor for tensor, is_quantised in zip(values, float8, strict=True) if is_quantised)
    plain = tuple(tensor for tensor, is_quantised in zip(values, float8, strict=True) if not is_quantised)
    scales = tuple(torch.empty(*shape[:3], dtype=torch.float32, device=device) for _ in quantised if not dequantize)
    if buffer.numel() > 0:
        if buffer.data_ptr() % ALIGNMENT != 0:
            buffer = buffer.clone()
        grid, sizes = _tiles(blocks, len(values))
        with on_device_of(buffer):
            _unpack_kernel[grid](
                quantised,
                scales,
                plain,
                *_views(buffer, dtype),
                _peers(blocks, gather_dim, device),
                *shape[:3],
                DIM=gather_dim,
                HEAD_DIM=shape[3],
                ELEMENT_SIZE=dtype.itemsize,
                DEQUANTIZE=dequantize,
                **sizes,
            )
    if dequantize:
        return values
    of_quantised = iter(scales)
    return [t for v, q in zip(values, float8, strict=True) for t in ((v, next(of_quantised)) if q else (v,))]


def _tiles(blocks: Sequence[Block], tensors: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid, and the constants that go with it."""
    columns = triton.next_power_of_2(max(blocks[0].shape[3], 1))
    rows = max(1, 32 * NUM_WARPS * ELEMENTS_PER_THREAD // columns)
    most = max(batch * length * heads for batch, length, heads, _ in (block.shape for block in blocks))
    return (triton.cdiv(most, rows), len(blocks), tensors), {"ROWS": rows, "COLUMNS": columns, "num_warps": NUM_WARPS}


def _views(buffer: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The buffer as codes, as elements and as scales."""
    return buffer.view(torch.float8_e4m3fn), buffer.view(dtype), buffer.view(torch.float32)


def _peers(blocks: tuple[Block, ...], dim: int, device: torch.device) -> Tensor:
    return _uploaded(tuple((block.start, block.shape[dim], block.offset // ALIGNMENT) for block in blocks), device)


# Numbers in tuples are always specialised on, so these would compile anew for other lengths; as a tensor they are sent
# to the device once, and stay where captured graphs read them.
@functools.cache
def _uploaded(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device=device)
