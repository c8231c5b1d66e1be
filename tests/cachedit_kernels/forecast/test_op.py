"""residual_forecast against float64, whatever implementation serves the CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cachedit_kernels import residual_forecast
from cachedit_kernels.forecast import reference
from operands import DTYPES, LAYOUTS, dtypes, layouts, make, seeds, shapes

streams = st.lists(st.tuples(shapes, dtypes, layouts, layouts), min_size=1, max_size=3)
factors = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.0]), st.floats(-3, 3, width=32))
STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place


def assert_forecast(got: Tensor, hidden: Tensor, ring: Tensor, weights: Tensor, base: float) -> None:
    """Within one rounding to the dtype and float32 accumulation of the float64 result."""
    (expected,) = reference.residual_forecast([hidden.double()], [ring.double()], weights.double(), base)
    (magnitude,) = reference.residual_forecast(
        [hidden.double().abs()], [ring.double().abs()], weights.double().abs(), abs(base)
    )
    assert got.dtype == hidden.dtype and got.shape == hidden.shape
    assert got.stride() == torch.empty(hidden.shape).stride()
    error = (got.double() - expected).abs()
    smallest = torch.finfo(hidden.dtype).smallest_normal * STEP[hidden.dtype] * 2  # a subnormal's step
    accumulation = (ring.shape[0] + 2) * 2.0**-24 * magnitude
    assert (error <= STEP[hidden.dtype] * 1.01 * expected.abs() + accumulation * 1.01 + smallest).all()


@given(streams, st.lists(factors, max_size=4), factors, seeds)
@example([((2, 64, 96), torch.bfloat16, "token slice", "transposed")], [2.0, -1.0], 1.0, 0)
@example([((300_001,), dtype, "contiguous", "contiguous") for dtype in DTYPES], [0.5, 0.0, 3.0], 1.0, 0)
def test_forecast_is_right(streams: list, weights: list[float], base: float, seed: int) -> None:
    hidden = [make(shape, dtype, layout, seed) for shape, dtype, layout, _ in streams]
    ring = [make((len(weights), *shape), dtype, layout, seed + 1) for shape, dtype, _, layout in streams]
    got = residual_forecast(hidden, ring, weights, base)
    tensor = torch.tensor(weights, dtype=torch.float32)
    for g, h, r in zip(got, hidden, ring):
        assert_forecast(g, h, r, tensor, base)
        assert g.numel() == 0 or g.untyped_storage().data_ptr() not in (x.untyped_storage().data_ptr() for x in (h, r))
    for g, same in zip(got, residual_forecast(hidden, ring, tensor, base)):
        assert torch.equal(g, same)


@given(
    st.integers(0, 4), st.lists(st.tuples(shapes, dtypes, layouts), min_size=1, max_size=3), seeds, st.integers(0, 3)
)
@example(3, [((3, 5000), torch.float16, "token slice"), ((3,), torch.float32, "contiguous")], 0, 2)
def test_a_row_of_weights_per_sample(batch: int, streams: list, seed: int, slots: int) -> None:
    weights = make((batch, slots), torch.float32, ("contiguous", "transposed", "column slice")[seed % 3], seed)
    hidden = [make((batch, *shape[1:]), dtype, layout, seed) for shape, dtype, layout in streams]
    ring = [make((slots, *h.shape), h.dtype, "column slice", seed + 1) for h in hidden]
    got = residual_forecast(hidden, ring, weights)
    for b in range(batch):
        alone = residual_forecast([h[b] for h in hidden], [r[:, b] for r in ring], weights[b])
        for g, a in zip(got, alone):
            assert torch.equal(g[b], a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_reference(dtype: torch.dtype) -> None:
    hidden, ring = make((2, 7777, 5), dtype, "contiguous", 0), make((3, 2, 7777, 5), dtype, "contiguous", 1)
    for weights, base in itertools.product(([0.3, -1.7, 2.9], [0.0, 0.1, 0.0], [0.0] * 3), (1.0, 0.0, 0.7)):
        (got,), (expected,) = (
            f([hidden], [ring], weights, base) for f in (residual_forecast, reference.residual_forecast)
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_a_bit(layout: str) -> None:
    hidden, ring = make((3, 7777, 5), torch.float16, layout, 0), make((2, 3, 7777, 5), torch.float16, layout, 1)
    (got,) = residual_forecast([hidden], [ring], [0.7, 0.9])
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (hidden, ring)]
    (expected,) = residual_forecast([plain[0]], [plain[1]], [0.7, 0.9])
    assert torch.equal(got, expected) and got.is_contiguous()


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_a_slot_of_weight_zero_is_not_read(spoiled: float) -> None:
    for zero in (0.0, -0.0, 1e-60):  # the last one is zero in float32
        hidden, ring = torch.ones(2, 5000), torch.ones(3, 2, 5000)
        ring[1] = spoiled
        for weights in ([1.0, zero, 2.0], torch.tensor([1.0, zero, 2.0])):
            (got,) = residual_forecast([hidden], [ring], weights)
            assert torch.equal(got, torch.full((2, 5000), 4.0))
        ring[1, 0] = 1.0  # only sample 1 is spoiled, and only it has weight zero
        (got,) = residual_forecast([hidden], [ring], torch.tensor([[1.0, 1.0, 1.0], [1.0, zero, 2.0]]))
        assert torch.equal(got, torch.full((2, 5000), 4.0))


def test_hidden_is_not_read_where_base_is_zero() -> None:
    hidden, ring = torch.full((5000,), math.nan), torch.ones(1, 5000)
    assert torch.equal(residual_forecast([hidden], [ring], [3.0], 0.0)[0], torch.full((5000,), 3.0))
    assert torch.equal(residual_forecast([hidden], [ring], [0.0], 0.0)[0], torch.zeros(5000))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 16383, 20000])
def test_nan_and_inf_pass_through(dtype: torch.dtype, value: float, where: int) -> None:
    hidden, ring = torch.ones(20001, dtype=dtype), torch.ones(2, 20001, dtype=dtype)
    kind = torch.isnan if math.isnan(value) else torch.isinf
    for spoil in (hidden, ring[0], ring[1]):
        spoil[where] = value
        (got,) = residual_forecast([hidden], [ring], [1.0, 2.0])
        spoil[where] = 1.0
        assert kind(got[where]) and torch.isfinite(got).sum() == 20000
    for weights, base in (([math.nan, 1.0], 1.0), ([1.0, 1.0], math.nan)):
        assert torch.isnan(residual_forecast([hidden], [ring], weights, base)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_all_ones_does_not_round_to_a_number(dtype: torch.dtype) -> None:
    weights = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)
    ring = torch.ones(1, 33, dtype=dtype)
    for weight in weights.split(1):
        assert residual_forecast([ring[0]], [ring], weight, 0.0)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_survives_the_way_to_float32_and_back(dtype: torch.dtype) -> None:
    hidden = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    (got,) = residual_forecast([hidden], [hidden[None]], [0.0])
    nan = hidden.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(torch.int16)[~nan], hidden.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.25, 0.49999, 0.5, 0.50001, 0.75])
def test_rounding_is_to_nearest_even(dtype: torch.dtype, fraction: float) -> None:
    """Between every number and the next one, overflow to inf included; torch's own conversion is the measure."""
    low = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    low = low[low.isfinite()]
    high = (low.view(torch.int16) + 1).view(dtype)
    for sign in (1.0, -1.0):
        weights = [sign * (1 - fraction), sign * fraction]
        high_or_twice = torch.where(high.isfinite(), high, low)
        (got,) = residual_forecast([low], [torch.stack([low, high_or_twice])], weights, 0.0)
        exact = low.float() * torch.tensor(weights[0]) + high_or_twice.float() * torch.tensor(weights[1])
        assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_overflow_is_inf(dtype: torch.dtype) -> None:
    largest = torch.full((33,), torch.finfo(dtype).max, dtype=dtype)
    half_step = torch.finfo(dtype).eps / 4  # of the largest number, as a factor
    (below,) = residual_forecast([largest], [largest[None]], [half_step * 0.9])
    (above,) = residual_forecast([largest], [largest[None]], [half_step * 1.1])
    assert torch.equal(below, largest) and torch.isinf(above).all()
