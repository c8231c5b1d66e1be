import pytest
import torch

import cachedit
from cachedit import BlockAdapter, DBCacheConfig
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


def test_numbers(model):
    (stats,) = cachedit.summary(model, logging=False)
    assert (stats.transformer, stats.blocks) == ("Toy", "blocks")
    assert stats.computed_steps == [0, 1] and stats.cached_steps == stats.reused_steps == [2, 3, 4, 5]
    assert sorted(stats.residual_diffs) == [2, 3, 4, 5] and all(d > 0 for d in stats.residual_diffs.values())
    assert stats.skipped_blocks == pytest.approx(4 * 4 / (6 * 6))
    assert stats.bytes_held == 4 * (2 * 5 * 8 * 2 + 2 * 3 * 8)
    assert stats.cache_options["cache_config"].Fn_compute_blocks == 1
    assert [record.reason for record in stats.branches["default"]] == ["nothing stored", "warm-up", *["diff"] * 4]


def test_table(model, capsys):
    cachedit.summary(model, details=True)
    text = capsys.readouterr().out
    assert "| Toy.blocks | default | 6     | 4      | 44%" in text
    assert "| blocks | default | 1    | computed | -      | warm-up        |" in text
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1


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
    assert stats.nonfinite_diffs >= 1 and 3 in stats.computed_steps
