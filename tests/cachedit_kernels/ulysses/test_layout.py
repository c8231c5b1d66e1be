"""Where things lie in the exchanged buffers: nothing overlaps, everything is aligned, both sides agree."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachedit_kernels.ulysses.layout import (
    ALIGNMENT,
    HEADS,
    SEQUENCE,
    Block,
    Section,
    buffer_bytes,
    even_splits,
    layout,
)

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8)
formats = st.lists(st.booleans(), min_size=1, max_size=4)


def sections(block: Block) -> list[Section]:
    return [*block.values, *(section for section in block.scales if section is not None)]


@given(st.integers(0, 3), st.integers(0, 9), sizes, st.integers(0, 40), st.sampled_from([2, 4]), formats)
@example(1, 4608, list(even_splits(24, 8)), 128, 2, [True, False, True])
def test_sections_are_aligned_and_back_to_back(
    batch: int, length: int, splits: list[int], head_dim: int, element_size: int, float8: list[bool]
) -> None:
    for shape, dim in (
        ((batch, length, sum(splits), head_dim), HEADS),
        ((batch, sum(splits), length, head_dim), SEQUENCE),
    ):
        blocks = layout(shape, splits, dim, element_size, float8)
        end = start = 0
        for block, size in zip(blocks, splits, strict=True):
            rows = batch * length * size
            assert block.start == start and block.offset == end
            assert block.shape == tuple(size if d == dim else n for d, n in enumerate(shape))
            for section in sorted(sections(block), key=lambda section: (section.offset, section.nbytes)):
                assert section.offset % ALIGNMENT == 0 and 0 <= section.offset - end < ALIGNMENT
                end = section.offset + section.nbytes
            end = -(-end // ALIGNMENT) * ALIGNMENT
            assert block.offset + block.nbytes == end
            for quantised, values, scales in zip(float8, block.values, block.scales, strict=True):
                assert values.nbytes == rows * head_dim * (1 if quantised else element_size)
                assert (scales is None) == (not quantised) and (scales is None or scales.nbytes == 4 * rows)
            start += size
        assert start == sum(splits) and buffer_bytes(blocks) == end


@given(st.integers(1, 2), sizes, st.integers(0, 40), st.integers(0, 24), formats)
def test_what_one_side_packs_the_other_unpacks(
    batch: int, lengths: list[int], heads: int, head_dim: int, float8: list[bool]
) -> None:
    """Each block as the sender lays it out is the receiver's block from that sender, for both exchanges."""
    head_splits = even_splits(heads, len(lengths))

    def described(block: Block) -> tuple[object, ...]:
        return block.shape, block.nbytes, [(s.offset - block.offset, s.nbytes) for s in sections(block)]

    for sender, length in enumerate(lengths):
        to_heads = layout((batch, length, heads, head_dim), head_splits, HEADS, 2, float8)
        to_tokens = layout((batch, sum(lengths), head_splits[sender], head_dim), lengths, SEQUENCE, 2, float8)
        for receiver, (its_heads, its_length) in enumerate(zip(head_splits, lengths, strict=True)):
            of_tokens = layout((batch, sum(lengths), its_heads, head_dim), lengths, SEQUENCE, 2, float8)
            assert described(to_heads[receiver]) == described(of_tokens[sender])
            of_heads = layout((batch, its_length, heads, head_dim), head_splits, HEADS, 2, float8)
            assert described(to_tokens[receiver]) == described(of_heads[sender])


def test_the_order_of_sections() -> None:
    """Codes of Q and V, then K as it is, then the scales of Q and V."""
    (block,) = layout((1, 3, 2, 10), (2,), HEADS, 2, (True, False, True))
    assert block.values == (Section(0, 60), Section(128, 120), Section(64, 60))
    assert block.scales == (Section(256, 24), None, Section(288, 24)) and block.nbytes == 320


def test_bytes_on_the_wire_of_flux() -> None:
    """24 heads of 128, 4608 tokens on 8 ranks: what a rank sends in all, against bf16."""
    shape = (1, 4608 // 8, 24, 128)
    sent = {
        name: buffer_bytes(layout(shape, even_splits(24, 8), HEADS, 2, float8))
        for name, float8 in {"bf16": (False,) * 3, "fp8 but for K": (True, False, True), "fp8": (True,) * 3}.items()
    }
    rows = 4608 // 8 * 24
    assert sent == {"bf16": rows * 768, "fp8 but for K": rows * (512 + 8), "fp8": rows * (384 + 12)}


@pytest.mark.parametrize(("total", "parts", "expected"), [(10, 4, (3, 3, 2, 2)), (3, 4, (1, 1, 1, 0)), (8, 2, (4, 4))])
def test_even_splits(total: int, parts: int, expected: tuple[int, ...]) -> None:
    assert even_splits(total, parts) == expected
