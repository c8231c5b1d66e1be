"""merge_attention against float64, whatever implementation serves the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cachedit_kernels import merge_attention
from cachedit_kernels.attention import reference
from operands import DTYPES, LAYOUTS, layouts, make, seeds

STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place
attention_shapes = st.one_of(
    st.tuples(*[st.integers(0, 4)] * 3, st.integers(0, 70)), st.sampled_from([(2, 9, 3, 128), (1, 700, 5, 24)])
)
dtype_pairs = st.sampled_from(
    [(first, second) for first in DTYPES for second in DTYPES if first in (torch.float32, second)]
)
GAPS = (0.0, 1e-6, -0.7, 3.0, -20.0, 60.0, -100.0, 1e4, -1e30, math.inf, -math.inf)  # lse2 - lse; inf: one is empty


def random_lse(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Both of every kind of gap; where two infinities meet, both are empty."""
    generator = torch.Generator().manual_seed(seed)
    lse = 10 * torch.randn(shape, generator=generator)
    gap = torch.tensor(GAPS)[torch.randint(len(GAPS), shape, generator=generator)]
    empty = torch.rand(shape, generator=generator) < 0.1
    lse2 = torch.where(empty, -math.inf, lse + torch.where(gap == math.inf, 0.0, gap))
    return torch.where(empty | (gap == math.inf), -math.inf, lse), lse2


def assert_merged(got: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> None:
    """Within one rounding to the dtype and float32 arithmetic of the float64 result."""
    doubles = [tensor.double() for tensor in (out, lse, out2, lse2)]
    expected, expected_lse = reference.merge_attention(*doubles)
    magnitude, _ = reference.merge_attention(doubles[0].abs(), doubles[1], doubles[2].abs(), doubles[3])
    merged, merged_lse = got
    assert merged.dtype == out.dtype and merged.shape == out.shape and merged.is_contiguous()
    assert merged_lse.dtype == torch.float32 and merged_lse.shape == lse.shape and merged_lse.is_contiguous()
    tiny = torch.finfo(out.dtype).smallest_normal * STEP[out.dtype] * 2
    error = (merged.double() - expected).abs()
    assert (error <= STEP[out.dtype] * 1.01 * expected.abs() + 2e-6 * magnitude + tiny).all(), error.max()
    torch.testing.assert_close(merged_lse.double(), expected_lse, rtol=2e-7, atol=2e-7)


@given(attention_shapes, dtype_pairs, layouts, layouts, seeds)
@example((2, 33, 5, 64), (torch.bfloat16, torch.bfloat16), "transposed", "token slice", 0)
@example((1, 3, 2, 40000), (torch.float32, torch.float16), "column slice", "contiguous", 0)
@example((2, 3000, 3, 9), (torch.float32, torch.bfloat16), "every second", "transposed", 0)
def test_merging_is_right(shape: tuple, pair: tuple, layout: str, layout2: str, seed: int) -> None:
    out, out2 = make(shape, pair[0], layout, seed), make(shape, pair[1], layout2, seed + 1)
    lse, lse2 = random_lse(shape[:3], seed)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # as most attention kernels leave it
    assert_merged(merge_attention(out, lse, out2, lse2), out, lse, out2, lse2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_halves_of_the_keys_give_the_attention_over_all(dtype: torch.dtype) -> None:
    q, k, v = (make((1, 4, 50, 32), torch.float64, "contiguous", seed) for seed in range(3))

    def attention(keys: slice) -> tuple[Tensor, Tensor]:
        scores = q @ k[:, :, keys].mT * 3
        return (scores.softmax(-1) @ v[:, :, keys]).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)

    parts = [attention(keys) for keys in (slice(0, 7), slice(7, 45), slice(45, 45), slice(45, 50))]
    running, lse = parts[0][0].float(), parts[0][1].float()
    for out2, lse2 in parts[1:]:
        running, lse = merge_attention(running, lse, out2.to(dtype), lse2.float())
    whole, whole_lse = attention(slice(None))
    torch.testing.assert_close(running.double(), whole, rtol=0, atol=2e-6 + 4 * STEP[dtype])
    torch.testing.assert_close(lse.double(), whole_lse, rtol=1e-6, atol=1e-6)


def test_an_empty_result_is_not_read() -> None:
    x, lse, empty = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4), torch.full((2, 3, 4), -math.inf)
    garbage = torch.full_like(x, math.nan)
    for got in (merge_attention(x, lse, garbage, empty), merge_attention(garbage, empty, x, lse)):
        assert torch.equal(got[0], x) and torch.equal(got[1], lse)
    merged, merged_lse = merge_attention(garbage, empty, garbage, empty)
    assert torch.equal(merged, torch.zeros_like(x)) and torch.equal(merged_lse, empty)


def test_no_gap_overflows() -> None:
    ones = torch.ones(1, 1, 1, 8)
    for lse, lse2, expected in ((3e38, -3e38, 1.0), (-3e38, 3e38, 2.0), (3e38, 3e38, 1.5), (-3e38, -3e38, 1.5)):
        both = torch.full((1, 1, 1), lse), torch.full((1, 1, 1), lse2)
        merged, merged_lse = merge_attention(ones, both[0], 2 * ones, both[1])
        assert (merged == expected).all() and merged_lse.item() == max(both[0].item(), both[1].item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_its_elements_and_no_others(dtype: torch.dtype) -> None:
    out, out2 = (torch.ones(1, 5, 3, 40, dtype=dtype) for _ in range(2))
    lse, lse2 = torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    out[0, 1, 2, 3] = out2[0, 4, 0, 39] = math.nan
    merged, merged_lse = merge_attention(out, lse, out2, lse2)
    assert merged.isnan().nonzero().tolist() == [[0, 1, 2, 3], [0, 4, 0, 39]] and not merged_lse.isnan().any()
    ones = torch.ones(1, 5, 3, 40, dtype=dtype)
    for spoiled in (lse, lse2):
        for other in (0.0, -math.inf, math.nan):
            lse.fill_(0.0)
            lse2.fill_(0.0)
            (lse2 if spoiled is lse else lse)[0, 2, 1] = other
            spoiled[0, 2, 1] = math.nan
            merged, merged_lse = merge_attention(ones, lse, ones, lse2)
            assert merged[0, 2, 1].isnan().all() and merged.isnan().sum() == 40
            assert merged_lse.isnan().nonzero().tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_a_bit(layout: str) -> None:
    shape = (3, 77, 5, 24)
    operands = [make(shape, torch.float16, layout, 0), make(shape[:3], torch.float32, layout, 1)]
    operands += [make(shape, torch.float16, layout, 2), make(shape[:3], torch.float32, layout, 3)]
    got = merge_attention(*operands)
    expected = merge_attention(*(t.clone(memory_format=torch.contiguous_format) for t in operands))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
