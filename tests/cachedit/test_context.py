import math

import pytest
import torch

from cachedit import CalibratorConfig, DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.context import SectionState
from cachedit.metric import Measured
from cachedit.policy import Decision

SHAPES = [(2, 5, 8), (2, 3, 8)]


def streams(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def compute(state, step, diff=None):
    inputs = streams(step)
    decision, diff = state.decide(Measured(inputs[0] - 1, inputs[0]), inputs)
    assert decision is Decision.COMPUTE
    state.store(inputs, [x * 2 + step for x in inputs], diff)
    return inputs


def config(**kwargs):
    return DBCacheConfig(**{"max_warmup_steps": 0, "residual_diff_threshold": 1e9, **kwargs})


def test_ring_holds_the_last_residuals_and_wraps():
    state = SectionState(config(residual_diff_threshold=0.0), TaylorSeerCalibratorConfig(taylorseer_order=2))
    residuals = [[x + step for x in compute(state, step)] for step in range(5)]
    assert state.residuals.steps == [4, 3, 2]
    for stream, ring in enumerate(state.residuals.rings):
        assert ring.shape == (3, *SHAPES[stream])
        for slot, step in enumerate([3, 4, 2]):  # step 3 took slot 0 again
            torch.testing.assert_close(ring[slot], residuals[step][stream])


def test_forecast_is_the_weighted_sum():
    state = SectionState(config(), TaylorSeerCalibratorConfig())
    inputs = [compute(state, 0)]
    state.policy.stored = False  # compute again
    inputs.append(compute(state, 1))
    hidden = streams(9)
    decision, diff = state.decide(Measured(hidden[0] - 1.0, hidden[0]), hidden)
    assert decision is Decision.REUSE and math.isfinite(diff)
    for out, h, old, new in zip(state.forecast(hidden, diff), hidden, *inputs, strict=True):
        torch.testing.assert_close(out, h + 2 * (new + 1) - (old + 0))


def test_difference_is_relative_to_the_anchor():
    state = SectionState(config(), None)
    compute(state, 0)  # head residual: 1 everywhere
    hidden = streams(1)
    _, diff = state.decide(Measured(hidden[0] - 1.25, hidden[0]), hidden)
    assert diff == pytest.approx(0.25, rel=1e-5)


def test_anchor_of_zero():
    state = SectionState(config(), None)
    hidden = streams(0)
    state.decide(Measured(hidden[0], hidden[0]), hidden)
    state.store(hidden, hidden, None)
    assert state.decide(Measured(hidden[0], hidden[0]), hidden)[1] == 0.0
    assert state.metric.measure(Measured(hidden[0] - 1, hidden[0])) == math.inf


def test_nothing_is_measured_or_anchored_where_nothing_can_be_reused_by_it():
    state = SectionState(config(steps_computation_mask=[1, 0, 1], steps_computation_policy="static"), None)
    compute(state, 0)
    assert state.metric.anchor is None


@pytest.mark.parametrize("order", [1, 2])
def test_hidden_states_can_be_stored_instead_of_residuals(order):
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order, calibrator_cache_type="hidden_states")
    state = SectionState(config(), calibrator)
    inputs = compute(state, 0)
    out = state.forecast(streams(7), None)
    for tensor, x in zip(out, inputs, strict=True):
        torch.testing.assert_close(tensor, x * 2)


def test_encoder_stream_can_be_reused_plainly():
    state = SectionState(config(), TaylorSeerCalibratorConfig(enable_encoder_calibrator=False))
    first = compute(state, 0)
    state.policy.stored = False
    second = compute(state, 1)
    hidden = streams(5)
    out = state.forecast(hidden, None)
    torch.testing.assert_close(out[0], hidden[0] + 2 * (second[0] + 1) - first[0])
    torch.testing.assert_close(out[1], hidden[1] + second[1] + 1)


def test_plain_calibrator_is_plain_reuse():
    assert (
        SectionState(config(), CalibratorConfig()).residuals.slots == SectionState(config(), None).residuals.slots == 1
    )


def test_buffers_stay_at_their_addresses_from_request_to_request():
    state = SectionState(config(), TaylorSeerCalibratorConfig())
    compute(state, 0)
    addresses = [ring.data_ptr() for ring in state.residuals.rings], state.metric.anchor.data_ptr()
    state.begin(None)
    assert state.residuals.steps == [] and not state.policy.stored
    compute(state, 0)
    assert ([ring.data_ptr() for ring in state.residuals.rings], state.metric.anchor.data_ptr()) == addresses


def test_buffers_made_under_inference_mode_can_be_written_outside():
    state = SectionState(config(residual_diff_threshold=0.5), TaylorSeerCalibratorConfig())
    with torch.inference_mode():
        compute(state, 0)
    state.begin(None)
    compute(state, 0)
    assert not state.residuals.rings[0].is_inference() and not state.metric.anchor.is_inference()


def test_bytes_held():
    state = SectionState(config(), TaylorSeerCalibratorConfig(taylorseer_order=1))
    assert state.bytes_held == 0
    compute(state, 0)
    elements = [math.prod(shape) for shape in SHAPES]
    assert state.bytes_held == 4 * (2 * sum(elements) + elements[0])


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_another_dtype_or_device_starts_afresh(change, caplog):
    state = SectionState(config(), None)
    compute(state, 0)
    state.check_streams([x.to(**change) for x in streams(1)])
    assert state.residuals.rings == [] and state.metric.anchor is None and not state.policy.stored
    (record,) = caplog.records
    assert "changed within a request at step 1" in record.message
    assert str(change.popitem()[1]).removeprefix("torch.") in record.message


@pytest.mark.parametrize("cache_type", ["residual", "hidden_states"])
@pytest.mark.parametrize("calibrated", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("count", [1, 2])
def test_each_stream_is_forecast_as_it_is_set(count, calibrated, cache_type):
    """A stream without a forecaster reuses its last residual, whatever is kept of the other."""
    calibrator = TaylorSeerCalibratorConfig(*calibrated, calibrator_cache_type=cache_type)
    state = SectionState(config(), calibrator)
    inputs, outputs = [], []
    for step in (0, 1):
        state.policy.stored = False
        inputs.append(streams(step)[:count])
        outputs.append([x * 2 + step for x in inputs[-1]])
        state.decide(Measured(inputs[-1][0] - 1, inputs[-1][0]), inputs[-1])
        state.store(inputs[-1], outputs[-1], None)
    hidden = streams(5)[:count]
    for i, out in enumerate(state.forecast(hidden, None)):
        kept = [o[i] if cache_type == "hidden_states" else o[i] - x[i] for x, o in zip(inputs, outputs, strict=True)]
        forecast = 2 * kept[1] - kept[0] + (0 if cache_type == "hidden_states" else hidden[i])
        torch.testing.assert_close(out, forecast if calibrated[i] else hidden[i] + outputs[1][i] - inputs[1][i])
