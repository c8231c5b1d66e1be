import math

import numpy as np
import pytest
import torch

import cachedit
from cachedit import BlockAdapter, CacheStats, DBCacheConfig
from cachedit.policy import StepRecord
from cachedit.stats import BranchStats, format_table
from toys import make_toy, run_toy, toy_inputs


@pytest.fixture
def model():
    model = make_toy(depth=6)
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    config = DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=5.0, num_inference_steps=6
    )
    cachedit.enable_cache(adapter, config)
    run_toy(model, 6)
    return model


def record(step, reused=False, diff=None, pruned=0, blocks=0):
    return StepRecord(step, reused, diff, "diff", pruned, blocks)


def cells(table):
    """The table's cells, by column."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [dict(zip(head, row)) for row in rows]


def test_numbers(model):
    (stats,) = cachedit.summary(model, logging=False)
    assert (stats.transformer, stats.blocks) == ("Toy", "blocks")
    branch = stats.branches["default"]
    assert branch is stats.main and list(stats.branches) == ["default"]
    assert branch.computed_steps == [0, 1] and branch.reused_steps == [2, 3, 4, 5] and branch.runs == [4]
    assert sorted(branch.diffs) == [2, 3, 4, 5] and all(d > 0 for d in branch.diffs.values())
    assert branch.skipped_blocks == pytest.approx(4 * 4 / (6 * 6))
    assert branch.bytes_held == 4 * (2 * 5 * 8 * 2 + 2 * 3 * 8) and branch.nonfinite_diffs == 0
    assert [r.reason for r in branch.records] == ["nothing stored", "warm-up", *["diff"] * 4]


def test_names_that_users_of_cache_dit_read(model):
    (stats,) = cachedit.summary(model, logging=False)
    assert stats.computed_steps == [0, 1] and stats.cached_steps == [2, 3, 4, 5]
    assert stats.residual_diffs == {str(step): diff for step, diff in stats.main.diffs.items()}
    assert (stats.cfg_cached_steps, stats.cfg_residual_diffs) == ([], {})
    assert (stats.pruned_steps, stats.pruned_blocks, stats.actual_blocks, stats.pruned_ratio) == ([], [], [], None)
    assert (stats.cfg_pruned_steps, stats.cfg_pruned_blocks, stats.cfg_actual_blocks) == ([], [], [])
    assert stats.cfg_pruned_ratio is None
    assert stats.cache_options["cache_config"].Fn_compute_blocks == 1
    assert stats.cache_options["calibrator_config"] is None


def test_options_are_a_copy(model):
    cachedit.summary(model, logging=False)[0].cache_options["cache_config"].Fn_compute_blocks = 3
    assert cachedit.summary(model, logging=False)[0].cache_options["cache_config"].Fn_compute_blocks == 1


def test_branches(model):
    cachedit.refresh_context(model, enable_separate_cfg=True, cfg_compute_first=True, max_cached_steps=1)
    with torch.no_grad():
        for call in range(8):
            model(**toy_inputs(call // 2, 6, seed=call % 2))
    (stats,) = cachedit.summary(model, logging=False)
    assert list(stats.branches) == ["uncond", "cond"]  # in calling order
    assert stats.cached_steps == stats.cfg_cached_steps == [2]
    assert stats.residual_diffs == {"2": stats.branches["cond"].diffs[2]}
    assert stats.cfg_residual_diffs == {"2": stats.branches["uncond"].diffs[2]}
    assert stats.residual_diffs != stats.cfg_residual_diffs


@pytest.mark.parametrize("name", ["default", "cond_uncond", "pred_cond", "anything"])
def test_main_branch(name):
    main, uncond = BranchStats([record(0)]), BranchStats([record(0), record(1)])
    stats = CacheStats(branches={"pred_uncond": uncond, name: main})
    assert stats.main is main and stats.uncond is uncond


def test_runs():
    branch = BranchStats([record(step, reused=bit == "1") for step, bit in enumerate("0110111001")])
    assert branch.runs == [2, 3, 1] and sum(branch.runs) == len(branch.reused_steps)


@pytest.mark.parametrize("count", [1, 2, 7, 24])
@pytest.mark.parametrize("percent", [0, 25, 50, 75, 95, 100])
def test_percentiles_are_those_of_numpy(count, percent):
    diffs = np.random.default_rng(count).random(count)
    branch = BranchStats([record(step, diff=float(diff)) for step, diff in enumerate(diffs)])
    assert branch.diff_percentile(percent) == pytest.approx(np.percentile(diffs, percent), rel=1e-12)


def test_percentiles_leave_out_what_is_not_finite():
    assert BranchStats().diff_percentile(50) is None
    branch = BranchStats([record(i, diff=d) for i, d in enumerate([math.nan, 0.2, math.inf, 0.4])])
    assert branch.diff_percentile(0) == 0.2 and branch.diff_percentile(100) == 0.4


def test_pruning():
    records = [record(0, blocks=10), record(1, pruned=4, blocks=10), record(2, reused=True, pruned=6, blocks=10)]
    stats = CacheStats("Toy", "blocks", branches={"cond": BranchStats(records, total=10)})
    assert stats.pruned_steps == [1, 2] and stats.pruned_blocks == [0, 4, 6] and stats.actual_blocks == [10, 10, 10]
    assert stats.pruned_ratio == stats.main.skipped_blocks == pytest.approx(1 / 3)
    summary, steps = format_table([stats], details=True).split("\n\n")
    assert cells(summary)[0]["Pruned Blocks"] == "10" and cells(summary)[0]["Skipped"] == "33%"
    assert [row["Decision"] for row in cells(steps)] == ["pruned 0 of 10", "pruned 4 of 10", "pruned 6 of 10"]


def test_table(model, capsys):
    stats = cachedit.summary(model, details=True)
    table, steps = capsys.readouterr().out.strip().split("\n\n")
    (row,) = cells(table)
    assert (row["Blocks"], row["Branch"], row["Steps"], row["Cache Steps"]) == ("Toy.blocks", "default", "6", "4")
    assert (row["Longest Run"], row["Skipped"], row["Non-finite"]) == ("4", "44%", "0") and "Pruned Blocks" not in row
    diffs = list(stats[0].residual_diffs.values())
    for column, percent in {"P00": 0, "P25": 25, "P50": 50, "P75": 75, "P95": 95, "Min": 0, "Max": 100}.items():
        assert row[f"Diffs {column}"] == f"{np.percentile(diffs, percent):.4f}"
    assert [row["Decision"] for row in cells(steps)] == ["computed"] * 2 + ["reused"] * 4
    assert cells(steps)[1] | {"Step": "1", "Diff": "-", "Reason": "warm-up"} == cells(steps)[1]
    for part in (table, steps):
        assert len({len(line) for line in part.splitlines()}) == 1


def test_not_enabled(capsys):
    assert cachedit.summary(make_toy()) == []
    assert "not enabled" in capsys.readouterr().out


def test_non_finite_diffs_are_counted(model):
    cachedit.refresh_context(model)
    with torch.no_grad():
        for step in range(5):
            inputs = toy_inputs(step, 6)
            if step == 3:
                inputs["hidden_states"][0, 0, 0] = float("nan")
            model(**inputs)
    (stats,) = cachedit.summary(model, logging=False)
    assert stats.main.nonfinite_diffs >= 1 and 3 in stats.main.computed_steps
