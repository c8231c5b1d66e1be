"""The decision, by the thousand: it sees numbers only."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedit import DBCacheConfig, PolicyConfig, StepView
from cachedit.policy import Decision, Policy, UserPolicy


def play(config, diffs, total=None):
    """Run a policy over the diffs that the steps would measure; returns one letter per step: C, R (and m: measured)."""
    policy, letters = Policy(config, total), ""
    for diff in diffs:
        if policy.refresh_due():
            policy.restart()
        decision, measured = policy.plan(), None
        if decision is Decision.MEASURE:
            measured, decision = diff, policy.decide(diff)
        policy.record(decision, measured)
        letters += (
            ("c" if decision is Decision.COMPUTE else "r")
            if measured is None
            else ("C" if decision is Decision.COMPUTE else "R")
        )
    return letters, policy


def config(**kwargs):
    return DBCacheConfig(**{"max_warmup_steps": 0, "residual_diff_threshold": 0.1, **kwargs})


def test_threshold():
    letters, policy = play(config(), [0.0, 0.05, 0.1, 0.2, 0.09])
    assert letters == "cRCCR"
    assert [record.diff for record in policy.records] == [None, 0.05, 0.1, 0.2, 0.09]


@pytest.mark.parametrize(("interval", "expected"), [(1, "ccccRR"), (2, "cRcRRR"), (3, "cRRcRR")])
def test_warmup(interval, expected):
    assert play(config(max_warmup_steps=4, warmup_interval=interval), [0.0] * 6)[0] == expected


@pytest.mark.parametrize("longest", [0, 1, 2, 3])
def test_no_run_is_longer_than_max_continuous_cached_steps(longest):
    letters, _ = play(config(max_continuous_cached_steps=longest), [0.0] * 40)
    runs = letters.replace("c", " ").replace("C", " ").split()
    assert max((len(run) for run in runs), default=0) == longest


def test_max_cached_steps():
    letters, _ = play(config(max_cached_steps=3), [0.0] * 8)
    assert letters == "cRRRcccc"


def test_accumulated_diff_computes_and_starts_anew():
    letters, _ = play(config(max_accumulated_residual_diff_threshold=0.1), [0.04] * 10)
    assert letters == "cRRRcRRRcR"


def test_computed_step_clears_the_accumulated_diff():
    letters, _ = play(config(max_accumulated_residual_diff_threshold=0.1), [0, 0.06, 0.5, 0.06, 0.06, 0.0])
    assert letters == "cRCRRc"


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_threshold_of_zero_never_reuses_and_never_measures(threshold):
    letters, policy = play(config(residual_diff_threshold=threshold), [0.0] * 4)
    assert letters == "cccc"
    assert not policy.measures


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_diff_computes_and_is_counted(bad):
    letters, policy = play(config(), [0.0, bad, 0.0])
    assert letters == "cCR"
    assert policy.nonfinite == 1


def test_mask_static_reuses_without_measuring():
    letters, policy = play(config(steps_computation_mask=[1, 0, 1, 0, 0], steps_computation_policy="static"), [9.0] * 5)
    assert letters == "crcrr"
    assert not policy.measures


def test_mask_dynamic_measures_at_zeros():
    letters, _ = play(config(steps_computation_mask=[1, 0, 1, 0, 0]), [9.0, 9.0, 9.0, 0.0, 9.0])
    assert letters == "cCcRC"


def test_static_mask_comes_before_the_limits():
    limits = {"max_cached_steps": 1, "max_continuous_cached_steps": 1, "residual_diff_threshold": -1.0}
    letters, _ = play(config(steps_computation_mask=[1, 0, 0, 0], steps_computation_policy="static", **limits), [0] * 4)
    assert letters == "crrr"


def test_warmup_is_cut_to_the_leading_ones_of_a_mask():
    letters, _ = play(config(max_warmup_steps=8, steps_computation_mask=[1, 1, 0, 1, 0]), [0.0] * 5)
    assert letters == "ccRcR"


def test_steps_beyond_a_static_mask_are_computed():
    letters, _ = play(config(steps_computation_mask=[1, 0], steps_computation_policy="static"), [0.0] * 4)
    assert letters == "crcc"


def test_mask_by_name_follows_the_step_count():
    letters, _ = play(config(steps_computation_mask="fast", steps_computation_policy="static"), [0] * 10, total=10)
    assert letters == "cccrcrrcrc"


@pytest.mark.parametrize(("policy", "expected"), [("once", "ccRRccRRRRRR"), ("repeat", "ccRRccRRccRR")])
def test_force_refresh(policy, expected):
    letters, played = play(
        config(max_warmup_steps=2, force_refresh_step_hint=4, force_refresh_step_policy=policy), [0.0] * 12
    )
    assert letters == expected
    assert len(played.records) == 12  # statistics carry on


def reference(config, diffs):
    """The rules of the design, one after another, in as plain a form as possible."""
    out, run, reused, accumulated = [], 0, 0, 0.0
    for step, diff in enumerate(diffs):
        mask = config.steps_computation_mask
        warmup = config.max_warmup_steps
        if mask is not None:
            while mask[:warmup] != [1] * warmup:
                warmup -= 1
        limit = config.max_accumulated_residual_diff_threshold
        if step == 0 or step in range(0, warmup, config.warmup_interval) or (mask is not None and mask[step]):
            reuse = False
        elif mask is not None and config.steps_computation_policy == "static":
            reuse = True
        elif (
            0 <= config.max_cached_steps <= reused
            or 0 <= config.max_continuous_cached_steps <= run
            or (limit is not None and accumulated >= limit)
        ):
            reuse = False
        else:
            reuse = diff < config.residual_diff_threshold
            accumulated += diff if reuse else 0.0
        run, reused = (run + 1, reused + 1) if reuse else (0, reused)
        accumulated = accumulated if reuse else 0.0
        out.append(reuse)
    return out


@given(data=st.data(), steps=st.integers(1, 30))
def test_against_the_rules_in_plain_form(data, steps):
    masks = st.lists(st.integers(0, 1), min_size=steps, max_size=steps).map(lambda mask: [1, *mask[1:]])
    configuration = data.draw(
        st.builds(
            DBCacheConfig,
            residual_diff_threshold=st.floats(0.01, 0.2),
            max_warmup_steps=st.integers(0, 6),
            warmup_interval=st.integers(1, 3),
            max_cached_steps=st.integers(-1, 8),
            max_continuous_cached_steps=st.integers(-1, 4),
            max_accumulated_residual_diff_threshold=st.none() | st.floats(0.01, 0.4),
            steps_computation_mask=st.none() | masks,
            steps_computation_policy=st.sampled_from(["dynamic", "static"]),
        )
    )
    diffs = data.draw(st.lists(st.floats(0, 0.3), min_size=steps, max_size=steps))
    _, policy = play(configuration, diffs)
    assert [record.reused for record in policy.records] == reference(configuration, diffs)


def test_policy_does_not_use_torch():
    code = (
        "import sys, types\n"
        "import importlib.util as u, pathlib\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "pkg = types.ModuleType('cachedit'); pkg.__path__ = [str(root)]; sys.modules['cachedit'] = pkg\n"
        "import cachedit.policy, cachedit.forecast, cachedit.mask\n"
        "assert 'torch' not in sys.modules"
    )
    import cachedit

    subprocess.run([sys.executable, "-c", code, cachedit.__path__[0]], check=True)


class Scripted:
    """Answers with a list of decisions, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def decide(self, step):
        self.asked.append(step)
        return self.answers.pop(0)


def test_a_policy_of_ones_own_is_asked_instead():
    compute, measure, reuse = Decision.COMPUTE, Decision.MEASURE, Decision.REUSE
    user = Scripted(reuse, measure, reuse, compute, measure, compute)
    policy = PolicyConfig(policy=lambda: user, max_warmup_steps=8).make_policy(10)
    assert isinstance(policy, UserPolicy) and policy.measures and not policy.never_reuses
    for diff in [None, None, 0.5, None, 0.25]:
        decision = policy.plan()
        if decision is measure:
            decision = policy.decide(diff)
        else:
            diff = None
        policy.record(decision, diff)
    assert [record.reused for record in policy.records] == [False, True, True, False, False]
    assert policy.records[0].reason == "nothing stored" and policy.records[1].reason == "Scripted"
    first, _, third, *_, last = user.asked
    assert first == StepView(step=1, total_steps=10, diff=None, reused=0, run=0)
    assert third == StepView(step=2, total_steps=10, diff=0.5, reused=1, run=1)
    assert last == StepView(step=4, total_steps=10, diff=0.25, reused=2, run=0)


def test_a_policy_of_ones_own_never_sees_a_diff_that_is_not_finite():
    user = Scripted(Decision.MEASURE)
    policy = PolicyConfig(policy=lambda: user).make_policy(None)
    policy.record(policy.plan(), None)
    assert policy.plan() is Decision.MEASURE and policy.decide(math.nan) is Decision.COMPUTE
    assert policy.nonfinite == 1 and len(user.asked) == 1


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([True], "policy: Scripted.decide must return a cachedit.Decision, got True"),
        ([Decision.MEASURE, Decision.MEASURE], "policy: Scripted.decide asked to measure a step whose diff it was"),
    ],
)
def test_answers_that_are_none(answers, message):
    policy = PolicyConfig(policy=lambda: Scripted(*answers)).make_policy(None)
    policy.record(policy.plan(), None)
    with pytest.raises(TypeError, match=message):
        policy.decide(0.1) if policy.plan() is Decision.MEASURE else None


@pytest.mark.parametrize("policy", [None, "fast", Scripted()])
def test_a_policy_is_made_by_something_that_can_be_called(policy):
    with pytest.raises(TypeError, match="policy must be a class or function that makes a StepPolicy, got"):
        PolicyConfig(policy=policy).validate()
