"""Where everything lies in the buffers that Ulysses exchanges. Plain Python over numbers, without torch.

Attention needs whole sequences, the layers around it hold pieces of it: P ranks scatter the heads of Q, K and V and
gather the sequence, and the other way round for the result O (DeepSpeed-Ulysses, arXiv 2309.14509). Tensors are
[B, L, H, D]. The side that packs cuts dimension 1 or 2 into a size per peer; the side that unpacks joins blocks along
the other one. Both describe what they hold by its shape, the sizes along the dimension that is cut, and that
dimension, so one function serves them:

    rank s packs      shape [B, L_s, H, D], cut along 2 by H_0 .. H_P-1;  its block for p is [B, L_s, H_p, D]
    rank p unpacks    shape [B, L, H_p, D], cut along 1 by L_0 .. L_P-1;  its block from s is [B, L_s, H_p, D]

A buffer holds a block per peer, one after the other. A block holds a section per array: the E4M3 codes of those tensors
that travel quantised, the elements of the others, then the scales (float32, one per token and head) of the former.
Every section starts at a multiple of 16 bytes; what fills up to the next one is zero. Nothing else is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

SEQUENCE, HEADS = 1, 2  # the dimensions of [B, L, H, D] that are scattered and gathered
ALIGNMENT = 16  # bytes
SCALE_BYTES = 4


class Section(NamedTuple):
    """An array in the buffer: where it starts, in bytes from the buffer's start, and its bytes without filling."""

    offset: int
    nbytes: int


class Block(NamedTuple):
    """What goes to, or comes from, one peer."""

    start: int  # along the dimension that is cut
    shape: tuple[int, int, int, int]
    offset: int  # in bytes from the buffer's start
    nbytes: int
    values: tuple[Section, ...]  # of each tensor: its codes [*shape] or its elements [*shape]
    scales: tuple[Section | None, ...]  # of each tensor: float32 [*shape[:3]] where it is quantised


def layout(
    shape: Sequence[int], splits: Sequence[int], dim: int, element_size: int, float8: Sequence[bool]
) -> tuple[Block, ...]:
    """The blocks of a buffer for tensors of one `shape`, cut along `dim` into `splits`.

    `element_size` is in bytes, for tensors that travel as they are; `float8` says for each tensor whether it is
    quantised. The buffer ends where the last block does.
    """
    blocks = []
    offset = 0
    for start, size in zip(accumulate(splits, initial=0), splits, strict=False):
        batch, length, heads, head_dim = (size if d == dim else n for d, n in enumerate(shape))
        rows = batch * length * heads
        end = offset
        values: list[Section | None] = [None] * len(float8)
        scales: list[Section | None] = [None] * len(float8)
        for sections, quantised, nbytes in (
            (values, True, rows * head_dim),
            (values, False, rows * head_dim * element_size),
            (scales, True, rows * SCALE_BYTES),
        ):
            for i, is_quantised in enumerate(float8):
                if is_quantised == quantised:
                    sections[i] = Section(end, nbytes)
                    end += aligned(nbytes)
        filled = tuple(section for section in values if section is not None)
        block_shape = (batch, length, heads, head_dim)
        blocks.append(Block(start, block_shape, offset, end - offset, filled, tuple(scales)))
        offset = end
    return tuple(blocks)


def buffer_bytes(blocks: Sequence[Block]) -> int:
    """The size of the buffer that holds them."""
    return sum(block.nbytes for block in blocks)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def even_splits(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` sizes that differ by one at most, larger ones first, as `torch.tensor_split` cuts."""
    size, rest = divmod(total, parts)
    return tuple(size + (part < rest) for part in range(parts))
