"""The definition of `ulysses_pack` and `ulysses_unpack`, in plain torch, for every device and float dtype.

A quantised tensor has a scale for each token and head: its rows are as float8/reference.py defines them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachedit_kernels.float8.reference import E4M3, from_e4m3, to_e4m3
from cachedit_kernels.ulysses.layout import Block, Section, buffer_bytes, layout


def ulysses_pack(tensors: Sequence[Tensor], splits: Sequence[int], scatter_dim: int, float8: Sequence[bool]) -> Tensor:
    """One uint8 buffer with a block for each peer."""
    like = tensors[0]
    blocks = layout(like.shape, splits, scatter_dim, like.element_size(), float8)
    buffer = torch.zeros(buffer_bytes(blocks), dtype=torch.uint8, device=like.device)

    def write(section: Section, array: Tensor) -> None:
        flat = array.contiguous().view(-1).view(torch.uint8)
        buffer[section.offset : section.offset + section.nbytes] = flat

    for block in blocks:
        for tensor, values, scales in zip(tensors, block.values, block.scales, strict=True):
            part = _part(tensor, block, scatter_dim)
            if scales is None:
                write(values, part)
            else:
                codes, row_scales = to_e4m3(part)
                write(values, codes)
                write(scales, row_scales)
    return buffer


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
    blocks = layout(shape, splits, gather_dim, dtype.itemsize, float8)

    def read(section: Section, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        return buffer[section.offset : section.offset + section.nbytes].clone().view(dtype).view(*shape)

    results = []
    for i, quantised in enumerate(float8):
        kept = torch.empty(*shape, dtype=E4M3 if quantised else dtype, device=buffer.device)
        scales = torch.empty(*shape[:3], dtype=torch.float32, device=buffer.device)
        for block in blocks:
            part = _part(kept.view(torch.uint8) if quantised else kept, block, gather_dim)
            part.copy_(read(block.values[i], part.dtype, block.shape))
            section = block.scales[i]
            if section is not None:
                _part(scales, block, gather_dim).copy_(read(section, torch.float32, block.shape[:3]))
        if not quantised:
            results.append(kept)
        elif dequantize:
            results.append(from_e4m3(kept, scales, dtype))
        else:
            results += [kept, scales]
    return results


def _part(tensor: Tensor, block: Block, dim: int) -> Tensor:
    return tensor.narrow(dim, block.start, block.shape[dim])
