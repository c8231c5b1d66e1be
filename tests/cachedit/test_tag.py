import pytest

import cachedit
from cachedit import (
    BlockAdapter,
    CacheStats,
    DBCacheConfig,
    DBPruneConfig,
    ForwardPattern,
    TaylorSeerCalibratorConfig,
    strify,
)
from toys import call_flux, make_toy, run_toy, tiny_flux_pipeline

CONFIG = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0)
TAG = "DBCache_F1B0_W2I1M0MC0_R9.0"


def test_what_is_enabled():
    pipe = tiny_flux_pipeline()
    assert strify(pipe) == ""
    cachedit.enable_cache(pipe, CONFIG, TaylorSeerCalibratorConfig(taylorseer_order=2))
    assert strify(pipe) == strify(pipe.transformer) == f"{TAG}_T1O2"
    call_flux(pipe, 6)
    stats = cachedit.summary(pipe, logging=False)
    assert strify(pipe) == strify(pipe.transformer) == strify(stats) == strify(stats[0]) == f"{TAG}_T1O2_S4"
    cachedit.enable_cache(pipe, CONFIG)
    assert strify(pipe) == f"{TAG}_T0O0"
    assert strify(stats) == f"{TAG}_T1O2_S4"  # statistics stay what they were
    cachedit.disable_cache(pipe)
    assert strify(pipe) == ""


def test_pruned_blocks():
    model = make_toy(depth=5)
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_0)
    config = DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0)
    cachedit.enable_cache(adapter, config)
    run_toy(model, 3)
    assert strify(adapter) == "DBPrune_F1B0_W1I1M0MC0_R9.0_P53.33_T0O0_S2"  # 8 of 15 blocks


@pytest.mark.parametrize(
    ("configuration", "tag"),
    [
        ({"cache_config": {"Fn_compute_blocks": 4, "enable_taylorseer": True}}, "DBCache_F4B0_W8I1M0MC0_R0.08_T1O1"),
        ({"max_cached_steps": 3}, "DBCache_F8B0_W8I1M3MC0_R0.08_T0O0"),
        ({"cache_type": "NONE"}, ""),
        ({"attention_backend": "native"}, ""),
    ],
)
def test_what_a_configuration_says(configuration, tag):
    assert strify(configuration) == tag


def test_nothing_enabled():
    assert strify(make_toy()) == strify([]) == strify(CacheStats()) == ""
