"""residual_l1, l1 and residual_push against float64, whatever implementation serves the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cachedit_kernels import l1, residual_l1, residual_push
from cachedit_kernels.residual import reference
from operands import DTYPES, LAYOUTS, dtypes, layouts, make, seeds, shapes

streams = st.lists(st.tuples(shapes, dtypes, layouts, layouts, layouts), min_size=1, max_size=3)


def assert_sums(got: Tensor, expected: Tensor, magnitudes: Tensor) -> None:
    """Within float32 rounding of the terms, `magnitudes` being what they are made of; equal terms all round one way."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert ((got.double() - expected).abs() <= 1e-6 * magnitudes + 1e-30).all(), (got, expected)


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


@given(streams, seeds)
@example([((2, 64, 96), torch.bfloat16, "token slice", "contiguous", "transposed")], 0)
@example([((300_001,), dtype, "contiguous", "every second", "contiguous") for dtype in DTYPES], 1)
def test_residual_l1_is_right(streams: list, seed: int) -> None:
    before = [make(shape, dtype, layout, seed) for shape, dtype, layout, _, _ in streams]
    after = [make(shape, dtype, layout, seed + 1) for shape, dtype, _, layout, _ in streams]
    anchor = [make(shape, dtype, layout, seed + 2) for shape, dtype, _, _, layout in streams]
    expected = reference.residual_l1(doubles(before), doubles(after), doubles(anchor))
    magnitudes = torch.stack([sum(t.double().abs().sum() for t in trio) for trio in zip(before, after, anchor)])
    assert_sums(residual_l1(before, after, anchor), expected, magnitudes[:, None])


@given(streams, seeds)
def test_l1_is_right(streams: list, seed: int) -> None:
    previous = [make(shape, dtype, layout, seed) for shape, dtype, layout, _, _ in streams]
    current = [make(shape, dtype, layout, seed + 1) for shape, dtype, _, layout, _ in streams]
    expected = reference.l1(doubles(previous), doubles(current))
    magnitudes = torch.stack([sum(t.double().abs().sum() for t in pair) for pair in zip(previous, current)])
    assert_sums(l1(previous, current), expected, magnitudes[:, None])


@given(st.integers(0, 4), st.lists(st.tuples(shapes, dtypes, layouts), min_size=1, max_size=3), seeds)
@example(3, [((3, 20000), torch.float16, "token slice"), ((3, 1), torch.float32, "contiguous")], 0)
def test_sums_per_sample_are_the_sums_of_each_sample(batch: int, streams: list, seed: int) -> None:
    before, after, anchor = (
        [make((batch, *shape[1:]), dtype, layout, seed + i) for shape, dtype, layout in streams] for i in range(3)
    )
    sampled = residual_l1(before, after, anchor, per_sample=True)
    sampled_l1 = l1(before, after, per_sample=True)
    assert sampled.shape == sampled_l1.shape == (len(streams), batch, 2)
    for b in range(batch):
        alone = [[t[b : b + 1] for t in tensors] for tensors in (before, after, anchor)]
        assert torch.equal(sampled[:, b], residual_l1(*alone))
        assert torch.equal(sampled_l1[:, b], l1(*alone[:2]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_a_bit(layout: str) -> None:
    if layout == "expanded":
        before = after = anchor = make((3, 7777, 5), torch.float16, layout, 1)
    else:
        before, after, anchor = (make((3, 7777, 5), torch.float16, layout, seed) for seed in range(3))
    for per_sample in (False, True):
        plain = [[t.clone(memory_format=torch.contiguous_format)] for t in (before, after, anchor)]
        got = residual_l1([before], [after], [anchor], per_sample)
        assert torch.equal(got, residual_l1(*plain, per_sample)), layout
        assert torch.equal(l1([before], [after], per_sample), l1(*plain[:2], per_sample)), layout


def test_a_long_sum_of_equal_numbers_stays_exact_to_float32() -> None:
    """Sixteen million equal terms: one float32 accumulator would be off by a percent and more."""
    anchor = torch.full((2**24 + 3,), 0.1)
    got = residual_l1([torch.zeros_like(anchor)], [torch.full_like(anchor, 0.3)], [anchor])[0]
    residual = torch.tensor(0.3) - torch.tensor(0.1)
    expected = torch.stack([residual.double(), anchor[0].double()]) * anchor.numel()
    assert ((got.double() / expected - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 16383, 20000])  # a full vector, the end of a chunk, the padded rest
def test_nan_and_inf_pass_through(dtype: torch.dtype, value: float, where: int) -> None:
    tensors = [make((20001,), dtype, "contiguous", seed) for seed in range(3)]
    kind = torch.isnan if math.isnan(value) else torch.isinf
    for i in range(3):
        spoiled = [t.clone() for t in tensors]
        spoiled[i][where] = value
        moved, scale = residual_l1(*([t] for t in spoiled))[0]
        assert kind(moved)
        assert kind(scale) if i == 2 else torch.isfinite(scale)
    spoiled = [t.clone() for t in tensors]
    spoiled[0][where] = spoiled[1][where] = value
    assert torch.isnan(residual_l1(*([t] for t in spoiled))[0, 0])  # inf - inf as well
    moved, scale = l1([spoiled[0]], [tensors[1]])[0]
    assert kind(moved) and kind(scale)
    ring = torch.zeros(1, 20001, dtype=dtype)
    residual_push([tensors[0]], [spoiled[1]], [ring], 0)
    assert kind(ring[0, where]) and torch.isfinite(ring).sum() == 20000


def test_a_sum_too_large_for_float32_is_inf() -> None:
    huge = torch.full((8,), 3e38)
    assert residual_l1([torch.zeros(8)], [torch.zeros(8)], [huge])[0].tolist() == [math.inf, math.inf]


@given(streams, seeds, st.integers(1, 4), st.data())
@example([((2, 13000), torch.bfloat16, "batch slice", "column slice", "contiguous")], 0, 3, None)
def test_residual_push_writes_one_slot_and_rounds_once(streams: list, seed: int, slots: int, data) -> None:
    slot = data.draw(st.integers(0, slots - 1)) if data else 1
    before = [make(shape, dtype, layout, seed) for shape, dtype, layout, _, _ in streams]
    after = [make(shape, dtype, layout, seed + 1) for shape, dtype, _, layout, _ in streams]
    rings = [make((slots, *b.shape), b.dtype, "batch slice", seed + 2) for b in before]
    expected = [r.clone() for r in rings]
    for e, b, a in zip(expected, before, after):
        e[slot] = (a.float() - b.float()).to(b.dtype)
    for form in (slot, torch.tensor(slot), torch.tensor([slot], dtype=torch.int32)):
        got = [r.clone() for r in rings]
        assert residual_push(before, after, got, form) is None
        for g, e in zip(got, expected):
            assert torch.equal(g, e)


def test_residual_push_into_a_ring_with_gaps_between_slots_leaves_the_gaps_alone() -> None:
    whole = torch.full((3, 10), 7.0)
    ring = whole[:, :4]
    residual_push([torch.zeros(4)], [torch.ones(4)], [ring], torch.tensor(2, dtype=torch.uint8))
    assert whole.sum() == 7 * 26 + 4 and ring[2].tolist() == [1.0] * 4


def test_before_and_after_may_be_one_tensor() -> None:
    x, ring = torch.randn(5), torch.ones(2, 5)
    residual_push([x], [x], [ring], 0)
    assert ring.tolist() == [[0.0] * 5, [1.0] * 5]
