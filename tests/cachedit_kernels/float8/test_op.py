"""residual_push, residual_forecast and ring_gram on rings in E4M3, whatever implementation serves the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cachedit_kernels import residual_forecast, residual_push, ring_gram
from cachedit_kernels.float8.reference import SMALLEST_SCALE, from_e4m3, to_e4m3
from operands import DTYPES, dtypes, layouts, make, seeds, shapes

E4M3 = torch.float8_e4m3fn
rows = shapes.filter(len)  # a scale needs a dimension to be shared along
streams = st.lists(st.tuples(rows, dtypes, layouts), min_size=1, max_size=3)


def filled(shape: tuple[int, ...], slots: int, seed: int) -> tuple[Tensor, Tensor]:
    """A ring of random codes (NaN among them) and its scales, with gaps between the slots."""
    codes = torch.randint(0, 256, (2 * slots, *shape), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    scales = make((slots, *shape[:-1]), torch.float32, "batch slice", seed).abs()
    return codes.view(E4M3)[::2], scales


def finite(ring: Tensor) -> Tensor:
    """The same without NaN, for rings that are read."""
    codes = ring.view(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 3
    return ring


def nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """What codes and scales should stand for, in float64: for each row the nearest multiples of its scale."""
    table = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    table = torch.cat([-table, table])
    amax = x.abs().amax(-1) if x.shape[-1] else x.sum(-1)
    scales = (amax / 448).float().clamp(min=SMALLEST_SCALE).double()
    distances = (x[..., None] / scales[..., None, None] - table).abs()
    return distances.amin(-1), scales


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_the_nearest_there_is(dtype: torch.dtype) -> None:
    before, after = (make((3, 40, 65), dtype, "token slice", seed) * 10.0 ** -(2 * seed) for seed in range(2))
    after[0] *= torch.logspace(-9, 0, 65)  # reaches the subnormal numbers
    ring, scales = torch.zeros((1, 3, 40, 65), dtype=E4M3), torch.zeros(1, 3, 40)
    residual_push([before], [after], [ring], 0, [scales])
    residual = after.double() - before.double()
    distances, expected_scales = nearest(residual)
    torch.testing.assert_close(scales[0].double(), expected_scales, rtol=2e-7, atol=0)
    got = (residual / scales[0].double()[..., None] - ring[0].double()).abs()
    assert (got <= distances + 448 * 2**-22).all()
    assert ring[0].double().abs().amax(-1).eq(448).all()


@given(streams, seeds, st.integers(1, 4), st.data())
@example([((2, 64, 96), torch.bfloat16, "token slice"), ((3, 20000), torch.float16, "transposed")], 0, 3, None)
def test_push_writes_one_slot_as_the_definition_says(streams: list, seed: int, slots: int, data) -> None:
    slot = data.draw(st.integers(0, slots - 1)) if data else 1
    before = [make(shape, dtype, layout, seed) for shape, dtype, layout in streams]
    after = [make(shape, dtype, layout, seed + 1) for shape, dtype, layout in streams]
    for form in (slot, torch.tensor(slot), torch.tensor([slot], dtype=torch.int32)):
        rings, scales = zip(*(filled(b.shape, slots, seed + i) for i, b in enumerate(before)))
        expected = [(r.view(torch.uint8).clone(), s.clone()) for r, s in zip(rings, scales)]
        assert residual_push(before, after, rings, form, scales) is None
        for (codes, s), b, a in zip(expected, before, after):
            quantised, s[slot] = to_e4m3(a.float() - b.float())
            codes[slot] = quantised.view(torch.uint8)
        for r, s, (codes, e) in zip(rings, scales, expected):
            assert torch.equal(r.view(torch.uint8), codes) and torch.equal(s, e)


@given(streams, seeds, st.lists(st.sampled_from([0.0, 1.0, -0.37, 2.6]), min_size=1, max_size=4))
@example([((2, 64, 96), torch.bfloat16, "transposed"), ((3, 20000), torch.float32, "every second")], 0, [2.0, -1.0])
def test_forecast_is_right(streams: list, seed: int, weights: list[float]) -> None:
    hidden = [make(shape, dtype, layout, seed) for shape, dtype, layout in streams]
    rings, scales = zip(*(filled(h.shape, len(weights), seed + i) for i, h in enumerate(hidden)))
    for r in rings:
        finite(r)
    for base in (1.0, 0.0):
        for form in (weights, torch.tensor(weights)):
            for got, h, r, s in zip(residual_forecast(hidden, rings, form, base, scales), hidden, rings, scales):
                assert_forecast(got, h, r, s, torch.tensor(weights, dtype=torch.float64), base)


def assert_forecast(got: Tensor, h: Tensor, ring: Tensor, scales: Tensor, weights: Tensor, base: float = 1.0) -> None:
    """Within float32 rounding of the terms and one rounding of their sum, against float64."""
    factors = weights.float().double().movedim(-1, 0)
    factors = factors.reshape(*factors.shape, *[1] * (h.dim() + 1 - factors.dim()))
    terms = [base * h.double(), *(factors * from_e4m3(ring, scales, torch.float64))]
    expected, magnitude = sum(terms), sum(term.abs() for term in terms)
    rounding = torch.finfo(got.dtype).eps / 2 * expected.abs() + torch.finfo(got.dtype).smallest_normal
    assert got.shape == h.shape and got.dtype == h.dtype and got.is_contiguous()
    fits = ((got.double() - expected).abs() <= rounding + 5e-7 * magnitude) | (got.isinf() & (magnitude > 6e4))
    assert fits.all()


@given(st.integers(1, 4), st.tuples(rows, dtypes, layouts), seeds, st.integers(1, 3))
@example(3, ((1, 70, 33), torch.bfloat16, "token slice"), 1, 2)
def test_weights_of_each_sample(batch: int, stream: tuple, seed: int, slots: int) -> None:
    shape, dtype, layout = stream
    hidden = make((batch, *shape), dtype, layout, seed)
    ring, scales = filled(hidden.shape, slots, seed)
    weights = make((batch, slots), torch.float32, "transposed", seed)
    weights[0] = 0.0
    (got,) = residual_forecast([hidden], [finite(ring)], weights, scales=[scales])
    assert_forecast(got, hidden, ring, scales, weights.double())
    assert torch.equal(got[0], hidden[0])


def test_slots_that_weigh_nothing_are_not_read() -> None:
    ring, scales = torch.full((3, 2, 70), math.nan).to(E4M3), torch.full((3, 2), math.nan)
    ring[1], scales[1] = torch.ones(2, 70).to(E4M3), 2.0
    hidden = torch.ones(2, 70)
    for weights in ([0.0, 3.0, -0.0], torch.tensor([0.0, 3.0, 0.0])):
        assert (residual_forecast([hidden], [ring], weights, scales=[scales])[0] == 7).all()
    assert (residual_forecast([hidden * math.nan], [ring], [0.0, 3.0, 0.0], 0.0, [scales])[0] == 6).all()
    assert ring_gram([ring], [1], scales=[scales]).tolist() == [[[560.0]]]


@given(streams, st.one_of(st.none(), st.lists(st.integers(0, 4), max_size=6)), seeds)
@example([((2, 64, 96), torch.bfloat16, ""), ((3, 20001), torch.float32, "")], [4, 0, 2, 1], 0)
def test_gram_is_right(streams: list, slots: list[int] | None, seed: int) -> None:
    rings, scales = zip(*(filled(shape, 5, seed + i) for i, (shape, _, _) in enumerate(streams)))
    rings = [finite(r) for r in rings]
    got = ring_gram(rings, slots, scales=scales)
    values = [from_e4m3(r, s, torch.float64) for r, s in zip(rings, scales)]
    assert got.dtype == torch.float32 and torch.equal(got, got.mT)
    for g, v in zip(got.double(), values):
        v = v.flatten(1)[slice(None) if slots is None else slots]
        assert ((g - v @ v.mT).abs() <= 7e-7 * (v.abs() @ v.abs().mT) + 1e-30).all()


def test_a_gram_for_each_sample() -> None:
    ring, scales = filled((3, 41, 17), 4, 0)
    got = ring_gram([finite(ring)], [3, 1], True, [scales])
    for b in range(3):
        alone = ring_gram([ring[:, b].contiguous()], [3, 1], scales=[scales[:, b].contiguous()])
        torch.testing.assert_close(got[:, b], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is_and_an_infinity_spoils_its_row(dtype: torch.dtype) -> None:
    before, after = torch.zeros(3, 70, dtype=dtype), torch.ones(3, 70, dtype=dtype)
    after[0, 69] = math.nan
    after[1, 3] = -math.inf
    ring, scales = torch.zeros((1, 3, 70), dtype=E4M3), torch.zeros(1, 3)
    residual_push([before], [after], [ring], 0, [scales])
    (got,) = residual_forecast([before], [ring], [1.0], scales=[scales])
    assert got[0].isnan().sum() == 1 and got[0, 69].isnan() and (got[0, :69] == 1).all()
    assert got[1].isnan().all() and (got[2] == 1).all()


def test_a_residual_is_not_rounded_before_it_is_quantised() -> None:
    before, after = torch.full((2, 64), 1.0, dtype=torch.bfloat16), torch.full((2, 64), 2.0**-9, dtype=torch.bfloat16)
    ring, scales = torch.zeros((1, 2, 64), dtype=E4M3), torch.zeros(1, 2)
    residual_push([before], [after], [ring], 0, [scales])
    assert (ring[0].float() * scales[0, :, None] == torch.tensor(2.0**-9 - 1.0)).all()  # bfloat16 has no such number
