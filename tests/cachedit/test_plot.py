import sys

import matplotlib
import pytest

import cachedit
from cachedit import BlockAdapter, CacheStats, DBCacheConfig
from cachedit.policy import StepRecord
from cachedit.stats import BranchStats
from toys import make_toy, run_toy

matplotlib.use("Agg")


@pytest.fixture
def model():
    model = make_toy(depth=4)
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    config = DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=2,
        residual_diff_threshold=5.0,
        max_continuous_cached_steps=2,
        num_inference_steps=8,
    )
    cachedit.enable_cache(adapter, config)
    run_toy(model, 8)
    return model


def shaded(axis):
    return [(patch.get_x() + 0.5, patch.get_alpha()) for patch in axis.patches]


def test_what_is_drawn(model, tmp_path):
    (stats,) = cachedit.summary(model, logging=False)
    for given in (model, stats, [stats]):
        (axis,) = cachedit.plot_summary(given, tmp_path / "steps.png").axes
        assert shaded(axis) == [(step, 1.0) for step in stats.cached_steps] and len(stats.cached_steps) == 4
        lines = {line.get_label(): line for line in axis.lines}
        assert dict(zip(*lines["measured"].get_data())) == stats.main.diffs
        assert set(lines["threshold"].get_ydata()) == {5.0}
        assert axis.get_title(loc="left") == "Toy.blocks, default: 4 of 8 steps reused"
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_per_section_and_branch():
    records = [StepRecord(0, False, None, ""), StepRecord(1, True, 0.1, "")]
    options = {"cache_config": DBCacheConfig()}
    branches = {name: BranchStats(records) for name in ("cond", "uncond")}
    stats = [CacheStats("Toy", name, options, branches) for name in "ab"]
    axes = cachedit.plot_summary(stats).axes
    titles = [axis.get_title(loc="left").partition(":")[0] for axis in axes]
    assert titles == ["Toy.a, cond", "Toy.a, uncond", "Toy.b, cond", "Toy.b, uncond"]


def test_pruned_steps_are_shaded_by_share():
    records = [StepRecord(0, False, None, "", 0, 8), StepRecord(1, False, 0.1, "", 2, 8)]
    stats = CacheStats("Toy", "blocks", {"cache_config": DBCacheConfig()}, {"default": BranchStats(records)})
    (axis,) = cachedit.plot_summary(stats).axes
    assert shaded(axis) == [(1.0, 0.25)] and axis.get_title(loc="left").endswith("12% of the blocks pruned")


def test_nothing_to_draw():
    for nothing in ([], CacheStats(), make_toy()):
        with pytest.raises(ValueError, match="nothing to draw"):
            cachedit.plot_summary(nothing)


def test_without_matplotlib(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        cachedit.plot_summary(model)
