import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedit import CalibratorConfig, TaylorSeerCalibratorConfig
from cachedit.forecast import Reuse, TaylorSeer, make_forecaster, taylor_weights


def ladder_forecast(steps, values, step, order):
    """TaylorSeer as published: a ladder of finite differences, renewed at every computed step (oldest first)."""
    ladder, last = [], None
    for now, value in zip(steps, values, strict=True):
        new = [value]
        for i in range(min(order, len(ladder))):
            new.append((new[i] - ladder[i]) / (now - last))
        ladder, last = new, now
    return sum(rung * (step - last) ** i / math.factorial(i) for i, rung in enumerate(ladder))


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
    assert isinstance(make_forecaster(TaylorSeerCalibratorConfig(enable_calibrator=False)), Reuse)
    forecaster = make_forecaster(TaylorSeerCalibratorConfig(taylorseer_order=3))
    assert isinstance(forecaster, TaylorSeer)
    assert forecaster.slots == 4
