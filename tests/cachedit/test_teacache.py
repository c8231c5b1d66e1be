"""TeaCache's decisions, against the rule written out by itself; numbers only."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cachedit
from cachedit.config import CacheType
from cachedit.policy import Decision
from cachedit.teacache import POLYNOMIALS, TeaCacheConfig, TeaCachePolicy, fit_coefficients

IDENTITY = (1.0, 0.0)


def play(config, changes, total=None):
    """Run a policy over the signal's changes; one letter per step, capital where the change was asked for."""
    policy, letters = TeaCachePolicy(config, total), ""
    for change in changes:
        if policy.refresh_due():
            policy.restart()
        decision, measured = policy.plan(), None
        if decision is Decision.MEASURE:
            measured, decision = change, policy.decide(change)
        policy.record(decision, measured)
        letter = "c" if decision is Decision.COMPUTE else "r"
        letters += letter if measured is None else letter.upper()
    return letters, policy


def config(**kwargs):
    return TeaCacheConfig(**{"rel_l1_thresh": 0.1, "coefficients": IDENTITY, **kwargs})


# The rule


def test_changes_add_up_over_all_steps_until_the_threshold():
    letters, policy = play(config(), [9.0, 0.04, 0.04, 0.04, 0.04, 0.04, 0.2, 0.09])
    assert letters == "cRRCRRCR"
    assert [record.diff for record in policy.records] == [None, 0.04, 0.04, 0.04, 0.04, 0.04, 0.2, 0.09]
    assert policy.accumulated == pytest.approx(0.09)


def test_a_sum_of_exactly_the_threshold_computes():
    assert play(config(rel_l1_thresh=0.5), [0.0, 0.25, 0.25])[0] == "cRC"


def test_the_polynomial_goes_highest_power_first():
    policy = TeaCachePolicy(config(coefficients=(2.0, -1.0, 3.0)))
    assert policy.estimate(5.0) == 2.0 * 25 - 5 + 3


def test_first_and_last_step_are_computed():
    assert play(config(), [0.0] * 5, total=5)[0] == "cRRRc"
    assert play(config(), [0.0] * 5, total=None)[0] == "cRRRR"  # nobody knows that it is the last
    assert play(config(), [0.0], total=1)[0] == "c"


def test_a_negative_estimate_counts_by_its_size():
    letters, _ = play(config(coefficients=(-1.0, 0.0)), [0.0, 0.06, 0.06, 0.02])
    assert letters == "cRCR"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_change_that_is_not_finite_computes_and_is_counted(bad):
    for coefficients in (IDENTITY, (-1.0, 0.0), POLYNOMIALS["mochi"]):
        letters, policy = play(config(coefficients=coefficients), [0.0, bad, 0.0])
        assert letters == "cCR"
        assert policy.nonfinite == 1


# With the other fields


def test_warmup_and_limits_clear_the_sum():
    assert play(config(max_warmup_steps=3), [0.09] * 6)[0] == "cccRCR"
    assert play(config(max_continuous_cached_steps=1), [0.03] * 6)[0] == "cRcRcR"
    assert play(config(max_cached_steps=2), [0.01] * 6)[0] == "cRRccc"


def test_masks():
    dynamic = config(steps_computation_mask=[1, 0, 0, 1, 0, 0])
    assert play(dynamic, [0.06] * 6, total=6)[0] == "cRCcRc"  # the last step is computed all the same
    static = config(steps_computation_mask=[1, 0, 0, 1, 0, 0], steps_computation_policy="static")
    letters, policy = play(static, [9.0] * 6, total=6)
    assert letters == "crrcrr"
    assert not policy.measures and not policy.never_reuses


def test_force_refresh_starts_over():
    assert play(config(force_refresh_step_hint=3), [0.01] * 6)[0] == "cRRcRR"


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_threshold_of_zero_never_reuses_and_never_measures(threshold):
    letters, policy = play(config(rel_l1_thresh=threshold), [0.0] * 3)
    assert letters == "ccc"
    assert policy.never_reuses and not policy.measures
    assert TeaCachePolicy(config()).measures and not TeaCachePolicy(config()).never_reuses


def test_a_step_that_raised_leaves_the_sum_where_it_was():
    policy = TeaCachePolicy(config())
    policy.record(policy.plan(), None)
    for _ in range(3):  # decided, never recorded
        assert policy.plan() is Decision.MEASURE and policy.decide(0.06) is Decision.REUSE
    assert policy.accumulated == 0.0


# Against the rule written out by itself


def simulate(changes, coefficients, threshold):
    """The rule as its authors write it; whether each step is computed."""
    decisions, total = [], 0.0
    for step, change in enumerate(changes):
        if step in (0, len(changes) - 1):
            compute, total = True, 0.0
        else:
            total += sum(c * change**power for power, c in enumerate(reversed(coefficients)))
            compute = total >= threshold
            if compute:
                total = 0.0
        decisions.append(compute)
    return decisions


def computed(policy):
    return [not record.reused for record in policy.records]


def fractions(denominator, at_most):
    """Numbers whose powers and sums are exact in floating point, in whatever order they are taken."""
    return st.integers(0, at_most * denominator).map(lambda i: i / denominator)


@given(
    changes=st.lists(fractions(64, 1), min_size=1, max_size=60),
    coefficients=st.lists(fractions(8, 3), min_size=1, max_size=5),
    threshold=fractions(8, 3).filter(bool),
)
def test_against_a_simulation(changes, coefficients, threshold):
    _, policy = play(config(rel_l1_thresh=threshold, coefficients=coefficients), changes, total=len(changes))
    assert computed(policy) == simulate(changes, coefficients, threshold)


@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "ltx-video", "cogvideox1.5-5b"])
def test_against_a_simulation_with_published_polynomials(name):
    generator = torch.Generator().manual_seed(0)
    threshold = 5 * TeaCachePolicy(config(coefficients=name)).estimate(0.05)
    for _ in range(20):
        changes = (0.1 * torch.rand(50, generator=generator, dtype=torch.float64)).tolist()
        _, policy = play(config(rel_l1_thresh=threshold, coefficients=name), changes, total=50)
        assert computed(policy) == simulate(changes, POLYNOMIALS[name], threshold)
        assert 2 < sum(computed(policy)) < 50


# Configuration


def test_defaults_and_order_of_fields():
    defaults = TeaCacheConfig()
    defaults.validate()
    assert TeaCacheConfig(0.3, [1.0, 0.0]) == TeaCacheConfig(rel_l1_thresh=0.3, coefficients=[1.0, 0.0])
    assert (defaults.rel_l1_thresh, defaults.coefficients, defaults.metric) == (0.2, None, "l1")
    assert (defaults.Fn_compute_blocks, defaults.Bn_compute_blocks, defaults.max_warmup_steps) == (1, 0, 1)
    assert defaults.cache_type is CacheType.TeaCache
    assert isinstance(defaults, cachedit.BasicCacheConfig)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rel_l1_thresh": "much"}, TypeError, "rel_l1_thresh must be a number, got 'much'"),
        ({"rel_l1_thresh": float("nan")}, ValueError, "rel_l1_thresh must be a number, got NaN"),
        ({"coefficients": "fluxx"}, ValueError, "coefficients must be one of 'flux', .*, got 'fluxx'"),
        ({"coefficients": []}, ValueError, "coefficients must be at least one number"),
        ({"coefficients": [1.0, float("inf")]}, ValueError, "all of them finite"),
        ({"coefficients": [1.0, None]}, TypeError, "coefficients must be numbers, highest power first, or a name"),
        ({"coefficients": 0.5}, TypeError, "coefficients must be numbers, highest power first, or a name"),
        ({"metric": "l2"}, ValueError, "metric must be one of 'l1', 'sea', got 'l2'"),
        ({"residual_diff_threshold": 0.12}, ValueError, "residual_diff_threshold has no meaning .* set rel_l1_thresh"),
        ({"max_accumulated_residual_diff_threshold": 1.0}, ValueError, "has no meaning for TeaCacheConfig"),
        ({"Fn_compute_blocks": 0}, ValueError, "Fn_compute_blocks must be at least 1, got 0"),
        ({"steps_computation_mask": "slowest"}, ValueError, "steps_computation_mask must be one of"),
    ],
)
def test_validate(fields, error, message):
    with pytest.raises(error, match=message):
        TeaCacheConfig(**fields).validate()


def test_coefficients_may_be_an_array_or_a_tensor():
    given = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for coefficients in (given, given.numpy()):
        TeaCacheConfig(coefficients=coefficients).validate()
        assert TeaCachePolicy(TeaCacheConfig(coefficients=coefficients)).coefficients == (1.0, 0.5)


def test_policy_takes_coefficients_by_name_by_argument_or_not_at_all():
    assert TeaCachePolicy(TeaCacheConfig(coefficients="mochi")).coefficients == POLYNOMIALS["mochi"]
    assert TeaCachePolicy(TeaCacheConfig(), coefficients=IDENTITY).coefficients == IDENTITY
    with pytest.raises(ValueError, match="coefficients: neither given nor in the configuration"):
        TeaCachePolicy(TeaCacheConfig())


def test_strify_shows_the_threshold_that_counts():
    assert TeaCacheConfig(0.3).strify() == "TeaCache_F1B0_W1I1M0MC0_T0.3"
    assert TeaCacheConfig(0.3, metric="sea").strify() == "TeaCache_F1B0_W1I1M0MC0_T0.3_sea"


def test_published_polynomials_are_of_degree_four():
    assert {len(coefficients) for coefficients in POLYNOMIALS.values()} == {5}


# Fitting


def test_fit_recovers_a_published_polynomial():
    policy = TeaCachePolicy(TeaCacheConfig(coefficients="flux"))
    changes = [(0.01 * i, policy.estimate(0.01 * i)) for i in range(1, 40)]
    assert fit_coefficients(changes) == pytest.approx(POLYNOMIALS["flux"], rel=1e-6)


def test_fit_is_least_squares():
    line = fit_coefficients([(0.0, 0.0), (1.0, 1.0), (2.0, 1.0)], degree=1)
    assert line == pytest.approx((0.5, 1 / 6))


def test_fit_needs_different_changes():
    with pytest.raises(ValueError, match="degree 4 takes at least 5 different signal changes, got 2"):
        fit_coefficients([(0.1, 0.1), (0.2, 0.2)] * 10)


def test_policy_does_not_use_torch():
    code = (
        "import sys, types\n"
        "pkg = types.ModuleType('cachedit'); pkg.__path__ = [sys.argv[1]]; sys.modules['cachedit'] = pkg\n"
        "import cachedit.teacache\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, cachedit.__path__[0]], check=True)
