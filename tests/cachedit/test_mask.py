import csv
from pathlib import Path

import pytest

from cachedit import steps_mask
from cachedit.mask import MASK_POLICIES, check_mask

ROWS = list(csv.DictReader((Path(__file__).parents[1] / "data" / "step_masks.csv").open()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['policy']}-{row['total_steps']}")
def test_reference_masks(row):
    mask = steps_mask(total_steps=int(row["total_steps"]), mask_policy=row["policy"])
    assert "".join(map(str, mask)) == row["mask"]


@pytest.mark.parametrize("policy", MASK_POLICIES)
@pytest.mark.parametrize("steps", [*range(8, 130)])
def test_any_length_from_eight_up(policy, steps):
    mask = steps_mask(total_steps=steps, mask_policy=policy)
    assert len(mask) == steps
    assert mask[0] == mask[-1] == 1
    assert set(mask) <= {0, 1}


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_short_lengths_without_a_table(steps):
    with pytest.raises(ValueError, match=f"from 8 steps up, got {steps}"):
        steps_mask(total_steps=steps, mask_policy="fast")


def test_bins():
    assert steps_mask(compute_bins=[3, 1], cache_bins=[2, 1]) == [1, 1, 1, 0, 0, 1, 0]
    assert steps_mask(compute_bins=[3, 1], cache_bins=[2, 1], total_steps=4) == [1, 1, 1, 0]
    assert steps_mask(compute_bins=(2, 1, 1), cache_bins=(1,)) == [1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"compute_bins": [1]}, ValueError, "cache_bins is missing"),
        ({"compute_bins": [2], "cache_bins": [1], "total_steps": 9}, ValueError, "add up to 3 steps.*is 9"),
        ({"compute_bins": [2, -1], "cache_bins": [1]}, ValueError, r"compute_bins\[1\] must be at least 0, got -1"),
        ({"compute_bins": [2], "cache_bins": [0.5]}, TypeError, r"cache_bins\[0\] must be an integer"),
        ({"total_steps": 28, "mask_policy": "turbo"}, ValueError, "slow, medium, fast, ultra, got 'turbo'"),
        ({"total_steps": 28.0}, TypeError, "total_steps must be an integer"),
        ({"total_steps": 0}, ValueError, "at least 1, got 0"),
        ({}, ValueError, "total_steps is required"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        steps_mask(**kwargs)


@pytest.mark.parametrize(
    ("mask", "steps", "error", "message"),
    [
        ([1, 0, 2], None, ValueError, r"\[2\] must be 0 \(reuse\) or 1 \(compute\), got 2"),
        ([1, 0], 3, ValueError, "expected 3.*got 2"),
        ([], None, ValueError, "must not be empty"),
        (5, None, TypeError, "sequence of 0 and 1, got int"),
    ],
)
def test_check_mask(mask, steps, error, message):
    with pytest.raises(error, match=message):
        check_mask(mask, steps)
