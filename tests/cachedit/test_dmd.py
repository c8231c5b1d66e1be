import math

import pytest
import torch

import cachedit_kernels
from cachedit import DBCacheConfig, DMDCalibratorConfig
from cachedit.context import SectionState
from cachedit.dmd import DMD
from cachedit.forecast import taylor_weights
from cachedit.metric import Measured

SIZE = 4000
# Decaying, growing and oscillating modes per step; oscillations make less than half a turn in 3 steps, the largest
# spacing below. Each real number and each conjugate pair takes its share of slots.
DYNAMICS = {
    "one decay": [0.8],
    "two decays": [0.95, 0.7],
    "three": [1.02, 0.9, 0.6],
    "oscillation": [0.9 * complex(math.cos(0.7), math.sin(0.7))],
    "decay and oscillation": [0.97, 0.85 * complex(math.cos(0.9), math.sin(0.9))],
}


def trajectory(dynamics, step, seed=0):
    """A sum of exponentials in the step, one random direction each (two for an oscillation), float64."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(SIZE, dtype=torch.float64)
    for value in dynamics:
        power = complex(value) ** step
        for part in (power.real, power.imag)[: 2 if isinstance(value, complex) else 1]:
            total += part * torch.randn(SIZE, dtype=torch.float64, generator=generator)
    return total


def forecast(dmd, steps, step, values, dtype=torch.float64):
    """Steps and values oldest first; through inner products rounded to ``dtype``."""
    count = dmd.window(steps[::-1])
    newest_first = torch.stack(values[::-1])
    gram = (newest_first[:count] @ newest_first[:count].mT).to(dtype).tolist()
    weights = dmd.fit(steps[::-1], gram)(step)
    assert len(weights) == count
    return torch.tensor(weights, dtype=torch.float64) @ newest_first[:count]


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("spacing", [1, 2, 3])
@pytest.mark.parametrize("name", DYNAMICS)
def test_exact_on_exponentials_where_taylor_is_not(name, spacing):
    steps = [spacing * i for i in range(6)]
    values = [trajectory(DYNAMICS[name], step) for step in steps]
    for ahead in (1, 2, 3, 5):
        step = steps[-1] + ahead
        truth = trajectory(DYNAMICS[name], step)
        assert error(forecast(DMD(6), steps, step, values), truth) < 1e-6
        assert error(forecast(DMD(6), steps, step, values, torch.float32), truth) < 1e-3
        taylor = sum(w * v for w, v in zip(taylor_weights(steps[::-1], step, 1), values[::-1]))
        assert error(taylor, truth) > 3e-3


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [4, 5, 6, 9])
@pytest.mark.parametrize("noise", [0.0, 0.02], ids=["clean", "noisy"])
@pytest.mark.parametrize("name", ["two decays", "three", "decay and oscillation"])
def test_agrees_with_cache_dit(name, noise, count, rank):
    """On the same snapshots: to 1e-6 of the forecast's size, and to 1e-3 through inner products in float32."""
    peer = pytest.importorskip("cache_dit.caching.cache_contexts.calibrators.dmd")
    torch.manual_seed(count)
    steps = [2 * i for i in range(count)]
    values = [trajectory(DYNAMICS[name], step) for step in steps]
    values = [value + noise * torch.randn_like(value) for value in values]
    state = peer.DMDState(history=6, rank=rank)
    for step in range(steps[-1] + 4):
        state.mark_step_begin()
        if step in steps:
            state.update(values[steps.index(step)])
        elif step > steps[-1]:
            expected = state.approximate()
            kept = steps[-6:], step, values[-6:]
            assert error(forecast(DMD(6, rank), *kept), expected) < 1e-6
            assert error(forecast(DMD(6, rank), *kept, torch.float32), expected) < 1e-3


@pytest.mark.parametrize(
    ("steps", "window"),
    [
        ([0], 0),
        ([0, 1, 2], 0),
        ([0, 1, 2, 3], 4),
        ([0, 3, 6, 9, 12], 5),
        ([0, 1, 2, 3, 5], 0),
        ([0, 1, 3, 5, 7], 4),
        ([0, 1, 3, 5, 7, 9], 5),
    ],
    ids=str,
)
def test_fits_to_the_evenly_spaced_residuals_if_there_are_four(steps, window):
    assert DMD(6).window(steps[::-1]) == window
    if window:
        values = [trajectory([0.9, 0.6], step) for step in steps]
        assert error(forecast(DMD(6), steps, steps[-1] + 1, values), trajectory([0.9, 0.6], steps[-1] + 1)) < 1e-6
    assert DMD(6).weights([7, 5, 2], 9) == taylor_weights([7, 5, 2], 9, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_degenerate_inner_products_reuse_the_newest_residual(value):
    gram = [[value] * 4 for _ in range(4)]
    assert DMD(4).fit([3, 2, 1, 0], gram)(5) == [1.0, 0.0, 0.0, 0.0]


def test_forecasts_that_overflow_reuse_the_newest_residual():
    values = [trajectory([50.0], step) for step in range(4)]
    newest_first = torch.stack(values[::-1])
    weights = DMD(4).fit([3, 2, 1, 0], (newest_first @ newest_first.mT).tolist())
    assert weights(4)[0] > 1.0
    assert weights(3 + 10_000) == [1.0, 0.0, 0.0, 0.0]


def test_residuals_that_do_not_change_stay():
    values = [torch.ones(SIZE, dtype=torch.float64)] * 5
    torch.testing.assert_close(forecast(DMD(5), [0, 1, 2, 3, 4], 9, values), values[0], rtol=1e-6, atol=1e-6)


@pytest.fixture
def grams(monkeypatch):
    calls = []

    def counted(ring, slots=None, per_sample=False, scales=None):
        calls.append(len(ring))
        return cachedit_kernels.gram.ring_gram(ring, slots, per_sample, scales)

    monkeypatch.setattr(cachedit_kernels, "ring_gram", counted)
    return calls


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("cache_type", ["residual", "hidden_states"])
def test_in_a_cache_each_stream_is_fitted_once_per_run(grams, encoder, cache_type):
    calibrator = DMDCalibratorConfig(enable_encoder_calibrator=encoder, calibrator_cache_type=cache_type, dmd_history=5)
    state = SectionState(DBCacheConfig(max_warmup_steps=0, residual_diff_threshold=1e9), calibrator)
    dynamics = [DYNAMICS["decay and oscillation"], DYNAMICS["two decays"]]
    computed = [0, 2, 4, 6, 8, 10, 12]
    reused = 0
    for step in range(17):
        truth = [trajectory(d, step, seed).view(2, -1).float() for seed, d in enumerate(dynamics)]
        inputs = [0.1 * torch.ones_like(t) * step for t in truth]
        outputs = truth if cache_type == "hidden_states" else [x + t for x, t in zip(inputs, truth)]
        if step in computed:
            state.policy.stored = False
            state.decide(Measured(inputs[0] - 1, inputs[0]), inputs)
            state.store(inputs, outputs, None)
            residual = outputs[1] - inputs[1]
            continue
        got = state.forecast(inputs, None)
        if step < 8:
            continue
        assert (got[0] - outputs[0]).norm() < 5e-3 * truth[0].norm()
        plain = inputs[1] + residual  # a stream without a forecast keeps residuals in any case
        torch.testing.assert_close(got[1], outputs[1] if encoder else plain, rtol=1e-3, atol=5e-3)
        reused += 1
    assert reused == 6  # steps 9, 11, 13 to 16
    assert grams == [2 if encoder else 1] * 4  # after steps 6, 8, 10 and 12


def test_in_a_cache_uneven_steps_are_forecast_as_taylorseer_does(grams):
    state = SectionState(DBCacheConfig(max_warmup_steps=0, residual_diff_threshold=1e9), DMDCalibratorConfig())
    values = {}
    zero = torch.zeros(2, SIZE // 2)
    for step in range(9):
        if step in (0, 1, 2, 3, 5):
            state.policy.stored = False
            values[step] = trajectory([0.9, 0.5], step).view(2, -1).float()
            state.decide(Measured(zero - 1, zero), [zero])
            state.store([zero], [values[step]], None)
            continue
        (got,) = state.forecast([zero], None)
        if step == 4:
            assert grams == [1]
            assert error(got, trajectory([0.9, 0.5], 4).view(2, -1)) < 1e-3
        else:
            weights = taylor_weights([5, 3], step, 1)
            torch.testing.assert_close(got, weights[0] * values[5] + weights[1] * values[3])
    assert grams == [1]


def test_a_new_request_is_fitted_anew():
    state = SectionState(DBCacheConfig(max_warmup_steps=0, residual_diff_threshold=1e9), DMDCalibratorConfig())
    zero = torch.zeros(2, SIZE // 2)
    for rate in (0.9, 0.7):
        state.begin(None)
        for step in range(5):
            state.policy.stored = False
            state.decide(Measured(zero - 1, zero), [zero])
            state.store([zero], [trajectory([rate], step).view(2, -1).float()], None)
        (got,) = state.forecast([zero], None)
        assert error(got, trajectory([rate], 5).view(2, -1)) < 1e-4
