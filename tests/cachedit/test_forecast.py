import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachedit import (
    CalibratorConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from cachedit.dmd import DMD
from cachedit.forecast import (
    FittedForecaster,
    FoCa,
    Hermite,
    Reuse,
    TaylorSeer,
    foca_weights,
    hermite_weights,
    make_forecaster,
    taylor_weights,
)


def ladder_forecast(steps, values, step, order, basis=lambda i, elapsed: elapsed**i):
    """TaylorSeer as published: a ladder of finite differences, renewed at every computed step (oldest first)."""
    ladder, last = [], None
    for now, value in zip(steps, values, strict=True):
        new = [value]
        for i in range(min(order, len(ladder))):
            new.append((new[i] - ladder[i]) / (now - last))
        ladder, last = new, now
    return sum(rung * basis(i, step - last) / math.factorial(i) for i, rung in enumerate(ladder))


def foca_forecast(steps, values, step):
    """FoCa on tensors, every step in turn: computed ones update it, forecasts go back into it (oldest first)."""
    full = full_before = now = before = None
    computed = dict(zip(steps, values, strict=True))
    for at in range(steps[0], step + 1):
        if at in computed:
            full_before, full = full, computed[at]
            before, now = now, computed[at]
        elif before is None:
            result = full
        else:
            elapsed = at - max(s for s in steps if s <= at)
            change = (full - full_before) + (now - before)
            result = full + (elapsed / 2 * change if elapsed <= 3 else 3 / elapsed * (3 / 2 * change))
            before, now = now, result
    return result


def trajectory(values):
    """Tensors of a few elements, smooth enough to have differences of all sizes."""
    return [torch.tensor([value, math.sin(value), 1.0], dtype=torch.float64) for value in values]


def weighted(weights, values):
    """Values are oldest first, weights newest first."""
    return sum(weight * value for weight, value in zip(weights, values[::-1], strict=False))


schedules = st.lists(st.integers(1, 5), min_size=1, max_size=12).flatmap(
    lambda gaps: st.tuples(
        st.just([sum(gaps[: i + 1]) for i in range(len(gaps))]),
        st.lists(st.floats(-10, 10), min_size=len(gaps), max_size=len(gaps)),
        st.integers(1, 6),
    )
)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(schedule=schedules)
def test_weights_equal_the_derivative_ladder(order, schedule):
    steps, values, ahead = schedule
    step = steps[-1] + ahead
    newest_first = steps[::-1][: order + 1]
    weights = taylor_weights(newest_first, step, order)
    ours = sum(w * value for w, value in zip(weights, values[::-1], strict=False))
    expected = ladder_forecast(steps, values, step, order)
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)


HERMITE = [lambda x: 1, lambda x: 2 * x, lambda x: 4 * x**2 - 2, lambda x: 8 * x**3 - 12 * x]
HERMITE.append(lambda x: 16 * x**4 - 48 * x**2 + 12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(schedule=schedules, sigma=st.floats(0.1, 1.0))
def test_hermite_weights_equal_the_scaled_polynomials(order, schedule, sigma):
    steps, values, ahead = schedule
    values, step = trajectory(values), steps[-1] + ahead
    weights = hermite_weights(steps[::-1][: order + 1], step, order, sigma)
    expected = ladder_forecast(steps, values, step, order, lambda i, x: sigma**i * HERMITE[i](sigma * x))
    torch.testing.assert_close(weighted(weights, values), expected, rtol=1e-9, atol=1e-9)
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)


def test_hermite_of_first_order_is_a_damped_line():
    assert hermite_weights([7, 5], 9, 1, math.sqrt(0.5)) == pytest.approx(taylor_weights([7, 5], 9, 1))
    assert hermite_weights([7, 6], 9, 1, 0.5) == pytest.approx([2.0, -1.0])  # Taylor's would be 3, -2


@given(schedule=schedules)
def test_foca_weights_equal_the_recursion_from_the_oldest_value_kept(schedule):
    steps, values, ahead = schedule
    steps, values = steps[-FoCa.slots :], trajectory(values)[-FoCa.slots :]
    weights = foca_weights(steps[::-1], steps[-1] + ahead)
    torch.testing.assert_close(
        weighted(weights, values), foca_forecast(steps, values, steps[-1] + ahead), rtol=1e-9, atol=1e-9
    )
    assert sum(weights) == pytest.approx(1.0, abs=1e-9)


@given(schedule=schedules, kept=st.integers(2, 4))
def test_foca_forgets_what_lies_before_two_computed_steps_in_a_row(schedule, kept):
    gaps, values, ahead = schedule
    steps = [*gaps, gaps[-1] + 1, *(gaps[-1] + 1 + 3 * i for i in range(1, kept - 1))]
    values = trajectory([*values, *range(1, kept)])
    weights = foca_weights(steps[: -kept - 1 : -1], steps[-1] + ahead)
    expected = foca_forecast(steps, values, steps[-1] + ahead)
    torch.testing.assert_close(weighted(weights, values), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gap", [1, 2, 3, 4, 5, 8, 20])
@pytest.mark.parametrize("ahead", range(1, 8))
def test_foca_hardly_depends_on_more_than_four_values(gap, ahead):
    """The weights against the strict recursion over twelve values; the weights themselves reach 4."""
    steps = [gap * i for i in range(12)]
    strict = foca_weights(steps[::-1], steps[-1] + ahead)
    kept = foca_weights(steps[:-5:-1], steps[-1] + ahead)
    assert max(abs(a - b) for a, b in zip(kept, strict, strict=False)) < 0.5


@pytest.mark.parametrize("steps", [[0, 1, 2], [0, 1, 4], [0, 2, 3], [0, 3, 4, 5]], ids=str)
def test_foca_agrees_with_cache_dit(steps):
    foca = pytest.importorskip("cache_dit.caching.cache_contexts.calibrators.foca")
    state, values = foca.FoCaState(), {}
    for step in range(steps[-1] + 7):
        state.mark_step_begin()
        if step in steps:
            values[step] = torch.randn(5, dtype=torch.float64)
            state.update(values[step])
            continue
        known = [s for s in steps if s < step]
        weights = foca_weights(known[::-1][: FoCa.slots], step)
        expected = weighted(weights, [values[s] for s in known])
        torch.testing.assert_close(state.approximate(), expected, rtol=1e-12, atol=1e-12)


def test_exact_on_polynomials_of_even_steps():
    # With even gaps of 1, order 1 continues a line exactly.
    weights = taylor_weights([7, 6], 10, 1)
    assert weights == [4.0, -3.0]


def test_derivatives_from_the_second_computed_step():
    assert taylor_weights([0], 1, 2) == [1.0]
    assert taylor_weights([1, 0], 2, 2) == [2.0, -1.0]


def test_older_steps_than_the_order_needs_weigh_nothing():
    assert taylor_weights([5, 4, 3], 6, 1) == [2.0, -1.0, 0.0]


def test_make_forecaster():
    assert isinstance(make_forecaster(None), Reuse)
    assert isinstance(make_forecaster(CalibratorConfig()), Reuse)
    neither = TaylorSeerCalibratorConfig(enable_calibrator=False, enable_encoder_calibrator=False)
    assert isinstance(make_forecaster(neither), Reuse)
    forecaster = make_forecaster(TaylorSeerCalibratorConfig(taylorseer_order=3))
    assert isinstance(forecaster, TaylorSeer)
    assert forecaster.slots == 4
    forecaster = make_forecaster(HermiteCalibratorConfig(hermite_order=3, hermite_sigma=0.7))
    assert isinstance(forecaster, Hermite)
    assert (forecaster.slots, forecaster.sigma) == (4, 0.7)
    assert forecaster.weights([4, 2], 5) == hermite_weights([4, 2], 5, 3, 0.7)
    assert isinstance(make_forecaster(FoCaCalibratorConfig()), FoCa)
    assert isinstance(make_forecaster(FoCaCalibratorConfig(enable_calibrator=False)), FoCa)  # of the encoder
    forecaster = make_forecaster(DMDCalibratorConfig(dmd_history=5, dmd_rank=2, dmd_ridge=0.0))
    assert isinstance(forecaster, DMD) and isinstance(forecaster, FittedForecaster)
    assert (forecaster.slots, forecaster.rank, forecaster.ridge) == (5, 2, 0.0)
    assert not isinstance(make_forecaster(FoCaCalibratorConfig()), FittedForecaster)
