import dataclasses
import logging

import pytest

from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig, steps_mask
from cachedit.cli.environment import PREFIXES, VARIABLES, cache_from_environment

DEFAULT = DBCacheConfig(
    Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.24, max_continuous_cached_steps=3
)
BINS = {"SCM_COMPUTE_BINS": "8,3,3,2,2", "SCM_CACHE_BINS": "1, 2,2,2,3"}
BITS = steps_mask([8, 3, 3, 2, 2], [1, 2, 2, 2, 3])

CACHES = {  # variables without prefix, and what they change
    "nothing is set": ({}, {}),
    "empty is not set": ({"FN": "", "TAYLORSEER": " "}, {}),
    "FN": ({"FN": "2"}, {"Fn_compute_blocks": 2}),
    "BN": ({"BN": "3"}, {"Bn_compute_blocks": 3}),
    "WARMUP": ({"WARMUP": "0"}, {"max_warmup_steps": 0}),
    "RDT": ({"RDT": "0.4"}, {"residual_diff_threshold": 0.4}),
    "MC": ({"MC": "-1"}, {"max_continuous_cached_steps": -1}),
    "SCM_PRESET": ({"SCM_PRESET": "medium"}, {"steps_computation_mask": "medium"}),
    "SCM_PRESET none": ({"SCM_PRESET": "none"}, {}),
    "SCM_POLICY": ({"SCM_POLICY": "static"}, {"steps_computation_policy": "static"}),
    "SCM bins": (BINS, {"steps_computation_mask": BITS}),
    "SCM bins go before the preset": ({**BINS, "SCM_PRESET": "fast"}, {"steps_computation_mask": BITS}),
    "ENABLED": ({"ENABLED": "1", "FN": "4"}, {"Fn_compute_blocks": 4}),
}


def with_prefix(prefix, variables):
    return {prefix + name: value for name, value in variables.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("variables", "changes"), CACHES.values(), ids=CACHES)
def test_cache(prefix, variables, changes):
    expected = dataclasses.replace(DEFAULT, **changes)
    assert cache_from_environment(with_prefix(prefix, variables), None) == (expected, None)


@pytest.mark.parametrize(
    ("variables", "order"), [({"TAYLORSEER": "true"}, 1), ({"TAYLORSEER": "TRUE", "TS_ORDER": "2"}, 2)]
)
def test_taylorseer(variables, order):
    expected = DEFAULT, TaylorSeerCalibratorConfig(taylorseer_order=order)
    assert cache_from_environment(with_prefix("SGLANG_CACHE_DIT_", variables), None) == expected
    without = {**variables, "TAYLORSEER": "false"}
    assert cache_from_environment(with_prefix("SGLANG_CACHE_DIT_", without), None) == (DEFAULT, None)


def test_disabled_and_our_own_name_first():
    assert cache_from_environment({"SGLANG_CACHE_DIT_ENABLED": "false"}, None) == (None, None)
    both = {"SGLANG_CACHE_DIT_ENABLED": "false", "CACHEDIT_ENABLED": "on"}
    assert cache_from_environment(both, None) == (DEFAULT, None)


def test_bins_are_cut_at_the_last_step():
    cache, _ = cache_from_environment(with_prefix("CACHEDIT_", BINS), 20)
    assert cache.steps_computation_mask == BITS[:20]


def test_every_variable_has_a_row():
    used = {name for variables, _ in CACHES.values() for name in variables} | {"TAYLORSEER", "TS_ORDER"}
    assert used == set(VARIABLES)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ENABLED": "maybe"}, "CACHEDIT_ENABLED must be true or false, got 'maybe'"),
        ({"FN": "one"}, "CACHEDIT_FN must be an integer, got 'one'"),
        ({"FN": "0"}, "Fn_compute_blocks must be at least 1, got 0"),
        ({"RDT": "low"}, "CACHEDIT_RDT must be a number, got 'low'"),
        ({"TAYLORSEER": "1", "TS_ORDER": "9"}, "taylorseer_order must be from 1 to 4, got 9"),
        ({"SCM_PRESET": "slower"}, "CACHEDIT_SCM_PRESET must be one of none, slow, medium, fast, ultra, got 'slower'"),
        ({"SCM_POLICY": "both"}, "CACHEDIT_SCM_POLICY must be one of dynamic, static, got 'both'"),
        ({"SCM_COMPUTE_BINS": "1,x"}, "CACHEDIT_SCM_COMPUTE_BINS must be integers with commas between, got '1,x'"),
        ({"SCM_COMPUTE_BINS": "4,1"}, "SCM_COMPUTE_BINS and SCM_CACHE_BINS: .* cache_bins is missing"),
        (BINS, "SCM_COMPUTE_BINS and SCM_CACHE_BINS: .* add up to 28 steps"),
    ],
)
def test_wrong_values(variables, message):
    with pytest.raises(ValueError, match=message):
        cache_from_environment(with_prefix("CACHEDIT_", variables), 50)


def test_settings_of_a_second_transformer_are_not_taken_silently(caplog):
    with caplog.at_level(logging.WARNING, logger="cachedit.cli"):
        cache_from_environment({"SGLANG_CACHE_DIT_SECONDARY_FN": "2"}, None)
    assert "SGLANG_CACHE_DIT_SECONDARY_* has no effect" in caplog.text
