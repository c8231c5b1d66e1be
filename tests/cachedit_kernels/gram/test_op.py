"""ring_gram against float64, whatever implementation serves the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cachedit_kernels import ring_gram
from cachedit_kernels.gram import reference
from operands import DTYPES, LAYOUTS, dtypes, layouts, make, seeds, shapes

streams = st.lists(st.tuples(shapes, dtypes, layouts), min_size=1, max_size=3)
chosen = st.one_of(st.none(), st.lists(st.integers(0, 4), max_size=6))


def assert_gram(got: Tensor, ring: list[Tensor], slots: list[int] | None, per_sample: bool = False) -> None:
    """Within float32 rounding of the products' magnitudes, and symmetric to the bit."""
    expected = reference.ring_gram([r.double() for r in ring], slots, per_sample)
    magnitudes = reference.ring_gram([r.double().abs() for r in ring], slots, per_sample)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert torch.equal(got, got.mT)
    assert ((got.double() - expected).abs() <= 5e-7 * magnitudes + 1e-30).all(), (got, expected)


@given(streams, chosen, seeds)
@example([((2, 64, 96), torch.bfloat16, "token slice"), ((3,), torch.float32, "transposed")], None, 0)
@example([((300_001,), dtype, "contiguous") for dtype in DTYPES], [4, 0, 2, 1], 1)
def test_gram_is_right(streams: list, slots: list[int] | None, seed: int) -> None:
    ring = [make((5, *shape), dtype, layout, seed) for shape, dtype, layout in streams]
    assert_gram(ring_gram(ring, slots), ring, slots)


@given(st.integers(0, 3), streams, chosen, seeds)
@example(3, [((1, 20000), torch.float16, "token slice"), ((1,), torch.float32, "contiguous")], [3, 1], 0)
def test_a_matrix_for_each_sample(batch: int, streams: list, slots: list[int] | None, seed: int) -> None:
    ring = [make((5, batch, *shape[1:]), dtype, layout, seed) for shape, dtype, layout in streams]
    got = ring_gram(ring, slots, per_sample=True)
    assert_gram(got, ring, slots, per_sample=True)
    for b in range(batch):
        torch.testing.assert_close(got[:, b], ring_gram([r[:, b] for r in ring], slots), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", range(1, 17))
def test_any_number_of_slots(count: int, layout: str) -> None:
    ring = [make((count, 3, 701), torch.bfloat16, layout, count)]
    assert_gram(ring_gram(ring), ring, None)


def test_only_the_slots_asked_for_are_read() -> None:
    ring = torch.full((4, 5000), math.nan)
    ring[2], ring[0] = 1.0, 2.0
    assert ring_gram([ring], [2, 0]).tolist() == [[[5000.0, 10000.0], [10000.0, 20000.0]]]
    assert ring_gram([ring], [2, 2]).tolist() == [[[5000.0] * 2] * 2]
    assert ring_gram([ring], []).shape == (1, 0, 0)


def test_nan_and_inf_reach_their_products_and_no_others() -> None:
    ring = torch.ones(3, 100)
    ring[1, 50] = math.nan
    ring[2, 7] = math.inf
    (gram,) = ring_gram([ring])
    assert gram[0].tolist()[0] == 100.0 and gram[1].isnan().all() and gram[0, 2] == gram[2, 2] == math.inf


def test_long_sums_are_accurate() -> None:
    """Ten million equal products: a plain float32 sum would be off by percents, this one is not by 1e-7."""
    ring = torch.full((2, 10_000_001), 0.1)
    exact = 10_000_001 * float(ring[0, 0]) ** 2
    assert ring_gram([ring]).flatten().tolist() == pytest.approx([exact] * 4, rel=3e-7)
