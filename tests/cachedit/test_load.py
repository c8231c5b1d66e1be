import inspect
import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch

import cachedit
import cachedit_kernels
from cachedit import (
    CacheType,
    DBCacheConfig,
    DBPruneConfig,
    TaylorSeerCalibratorConfig,
    load_cache_config,
    load_configs,
    load_options,
)
from toys import flux_inputs, tiny_flux

ROOT = Path(__file__).parents[2]
KEYS = ["cache_config", "calibrator_config", "parallelism_config", "attention_backend", "quantize_config"]

EVERYTHING = {
    "cache_config": {"max_warmup_steps": 4, "enable_taylorseer": True, "taylorseer_order": 2},
    "parallelism_config": {"ulysses_size": "auto", "extra_parallel_modules": ["vae"]},
    "attention_backend": "native",
    "quantize_config": {"quant_type": "float8_per_row"},
}
QUANTIZATION = cachedit.QuantizeConfig(quant_type="float8_per_row")
PARALLELISM = cachedit.ParallelismConfig(ulysses_size="auto", extra_parallel_modules=["vae"])


def cache(**section):
    return load_cache_config({"cache_config": section})[0]


def calibrator(**section):
    return load_cache_config({"cache_config": section})[1]


def write(folder, text, name="cache.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_names_and_signatures():
    assert str(inspect.signature(load_configs)).startswith(
        "(path_or_dict: 'Document', return_dict: 'bool' = True, **kw"
    )
    assert str(inspect.signature(load_cache_config)).startswith("(path_or_dict: 'Document', **kwargs")
    assert str(inspect.signature(load_options)).startswith("(path_or_dict: 'Document', reset: 'bool' = False)")
    for name in ("load_cache_config", "load_configs", "load_options"):
        assert name in cachedit.__all__
        assert getattr(cachedit_kernels, name) is getattr(cachedit, name)


def test_every_section():
    loaded = load_configs(EVERYTHING)
    assert list(loaded) == KEYS
    assert loaded == {
        "cache_config": DBCacheConfig(max_warmup_steps=4),
        "calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=2, enable_encoder_calibrator=False),
        "parallelism_config": PARALLELISM,
        "attention_backend": "native",
        "quantize_config": QUANTIZATION,
    }
    assert load_configs(EVERYTHING, return_dict=False) == tuple(loaded.values())
    assert load_cache_config(EVERYTHING) == (loaded["cache_config"], loaded["calibrator_config"])


@pytest.mark.parametrize("name", ["cache.yaml", "cache.yml", "cache.json", "cache.JSON"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files_mean_what_dictionaries_mean(tmp_path, name, kind):
    path = write(tmp_path, json.dumps(EVERYTHING, indent=1), name)  # JSON is YAML too
    assert load_configs(kind(path)) == load_configs(EVERYTHING)


@pytest.mark.parametrize("key", ["parallelism_config", "attention_backend", "quantize_config"])
def test_sections_may_be_absent(key):
    given = {key: EVERYTHING[key]}
    objects = {"parallelism_config": PARALLELISM, "quantize_config": QUANTIZATION}
    loaded = {key: objects.get(key, EVERYTHING[key])}
    assert load_configs(given) == dict.fromkeys(KEYS) | loaded
    assert load_cache_config(given) == (None, None)


def test_the_given_dictionary_is_left_alone():
    mask = [1, 0]
    given = {"cache_config": {"steps_computation_mask": mask}, "parallelism_config": {"tp": 2}}
    loaded = load_configs(given)
    assert loaded["parallelism_config"] == cachedit.ParallelismConfig(tp_size=2)
    loaded["cache_config"].steps_computation_mask.append(1)
    assert given == {"cache_config": {"steps_computation_mask": [1, 0]}, "parallelism_config": {"tp": 2}}


@pytest.mark.parametrize("section", [{}, {"Fn_compute_blocks": 3, "enable_taylorseer": True, "cache_type": "DBCache"}])
def test_flat_form(section):
    assert load_configs(section) == load_configs({"cache_config": section})


def test_null_keeps_the_default():
    assert load_cache_config({"max_warmup_steps": None, "taylorseer_order": None}) == (DBCacheConfig(), None)


def test_reset_leaves_the_rest_at_none():
    config, forecaster = load_cache_config({"num_inference_steps": 5, "enable_taylorseer": True}, reset=True)
    assert config == DBCacheConfig().reset(num_inference_steps=5)
    assert forecaster == TaylorSeerCalibratorConfig(enable_encoder_calibrator=False)
    assert load_configs({"cache_type": "DBCache"}, reset=True)["cache_config"].cache_type is CacheType.DBCache
    with pytest.raises(ValueError, match="Fn_compute_blocks must be at least 1"):
        load_cache_config({"Fn_compute_blocks": 0}, reset=True)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rest'"):
        load_configs({}, rest=True)
    with pytest.raises(TypeError, match="path_or_dict must be a path or a dictionary, got int"):
        load_configs(3)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("fast", "fast"),
        ("110100", [1, 1, 0, 1, 0, 0]),
        ([1, 0, 1], [1, 0, 1]),
        ((1, 0), [1, 0]),
        ({"compute_bins": [2, 1], "cache_bins": [3]}, [1, 1, 0, 0, 0, 1]),
        (None, None),
    ],
)
def test_masks(mask, expected):
    assert cache(steps_computation_mask=mask).steps_computation_mask == expected


def test_bins_are_cut_to_the_steps():
    mask = {"compute_bins": [2, 2], "cache_bins": [1]}
    assert cache(steps_computation_mask=mask, num_inference_steps=4).steps_computation_mask == [1, 1, 0, 1]


@pytest.mark.parametrize("mask", ["fats", "", "1201", 110100, {}, True])
def test_what_is_no_mask(mask):
    message = 'cache_config: steps_computation_mask must be one of slow, .* in quotes such as "1101", .* got '
    with pytest.raises(ValueError, match=message + re.escape(repr(mask))):
        cache(steps_computation_mask=mask)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps_computation_mask": [1, 2]}, r"steps_computation_mask\[1\] must be 0 \(reuse\) or 1"),
        ({"steps_computation_mask": "10", "num_inference_steps": 3}, "steps_computation_mask must have .* expected 3"),
        ({"steps_computation_mask": "slow", "num_inference_steps": 5}, "num_inference_steps: named masks exist for 4,"),
        ({"steps_computation_mask": {"compute_bin": [1]}}, "steps_computation_mask: compute_bin: did you mean compute"),
        ({"steps_computation_mask": {"compute_bins": [1]}}, "steps_computation_mask: .*cache_bins is missing"),
        (
            {"steps_computation_mask": {"compute_bins": 6, "cache_bins": [1]}},
            "steps_computation_mask: compute_bins must be a list, got 6",
        ),
        (
            {"steps_computation_mask": {"compute_bins": [1], "cache_bins": [1]}, "num_inference_steps": 3},
            "steps_computation_mask: .*add up to 2 steps, but num_inference_steps is 3",
        ),
        (
            {"steps_computation_mask": {"cache_bins": None}, "num_inference_steps": 8},
            "steps_computation_mask: .* got None",
        ),
        ({"enable_seperate_cfg": True}, r"enable_seperate_cfg: did you mean enable_separate_cfg\?$"),
        ({"fn_compute_blocks": 1}, r"fn_compute_blocks: did you mean Fn_compute_blocks\?$"),
        ({"taylorser_order": 1}, r"taylorser_order: did you mean taylorseer_order\?$"),
        ({"xyzzy": 1}, "xyzzy: unknown key; known are cache_type, Fn_compute_blocks, "),
        ({1: 2}, "1: unknown key"),
        ({"max_warmup_steps": "many"}, "max_warmup_steps must be an integer, got 'many'"),
        ({"max_warmup_steps": -1}, "max_warmup_steps must be at least 0, got -1"),
        ({"enable_separate_cfg": "no"}, "enable_separate_cfg must be true or false, got 'no'"),
        ({"cfg_compute_first": 1}, "cfg_compute_first must be true or false, got 1"),
        ({"residual_diff_threshold": True}, "residual_diff_threshold must be a number, got True"),
        ({"residual_diff_threshold": "high"}, "residual_diff_threshold must be a number, got 'high'"),
        ({"max_accumulated_residual_diff_threshold": [1]}, r"max_accumulated_.*_threshold must be a number, got \[1\]"),
        ({"steps_computation_policy": "adaptive"}, "steps_computation_policy must be one of 'dynamic', 'static', "),
        ({"cache_type": "FBCache"}, "cache_type must be one of DBCache, DBPrune, TeaCache, got FBCache"),
        ({"cache_type": "DBPrune", "non_prune_block_id": [1]}, "non_prune_block_id: did you mean non_prune_block_ids"),
        ({"non_prune_block_ids": [1]}, "non_prune_block_ids: goes with cache_type DBPrune only, not with DBCache"),
        ({"enable_taylorseer": "yes"}, "enable_taylorseer must be true or false, got 'yes'"),
        ({"enable_taylorseer": True, "taylorseer_order": 9}, "taylorseer_order must be from 1 to 4, got 9"),
        ({"enable_taylorseer": True, "taylorseer_cache_type": "x"}, "taylorseer_cache_type must be one of 'residual'"),
        ({"enable_taylorseer": True, "enable_encoder_taylorseer": 1}, "enable_encoder_taylorseer must be true or"),
        ({"enable_taylorseer": True, "enable_foca": True}, "enable_taylorseer and enable_foca exclude each other"),
        ({"enable_dmd": True, "dmd_history": 3}, "dmd_history must be from 4 to 16, got 3"),
    ],
)
def test_errors_name_file_and_key(tmp_path, section, message):
    path = tmp_path / "cache.yaml"
    yaml = pytest.importorskip("yaml")
    path.write_text(yaml.safe_dump({"cache_config": section}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: cache_config: {message}"):
        load_configs(path)
    with pytest.raises(ValueError, match=f"^{message}"):
        load_configs(section)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cache_confg": {}}, r"cache_confg: did you mean cache_config\?"),
        ({"paralelism_config": {}}, r"paralelism_config: did you mean parallelism_config\?"),
        ({"cache_config": {}, "paralelism_config": {}}, r"paralelism_config: did you mean parallelism_config\?"),
        ({"attention_backend": "x", "max_warmup_steps": 1}, "max_warmup_steps: belongs in the section cache_config"),
        ({"cache_config": None}, "cache_config must be a mapping, got None"),
        ({"cache_config": [1]}, r"cache_config must be a mapping, got \[1\]"),
        ({"attention_backend": 1}, "attention_backend must be a string, got 1"),
        ({"quantize_config": "float8"}, "quantize_config must be a mapping, got 'float8'"),
        ({"quantize_config": {"quant_typ": 1}}, r"quantize_config: quant_typ: did you mean quant_type\?"),
        ({"quantize_config": {"quant_type": "fp9"}}, "quantize_config: quant_type must be one of float8_per_row, "),
        ({"quantize_config": {"exclude_layers": "embed"}}, "quantize_config: exclude_layers must be a list of names"),
        ({"parallelism_config": {"ulyses_size": 1}}, r"parallelism_config: ulyses_size: did you mean ulysses_size\?"),
        ({"parallelism_config": {"tp_size": 0}}, "parallelism_config: tp_size must be an integer of at least 1 or"),
        ({"parallelism_config": {"ring": True}}, "parallelism_config: ring_size must be an integer .* got True"),
        ({"parallelism_config": {"ring": 2, "ring_size": 4}}, "parallelism_config: ring and ring_size are one setting"),
        ({"parallelism_config": {"ring": "auto", "tp_size": "auto"}}, "parallelism_config: at most one of .* may be"),
    ],
)
def test_errors_in_other_sections(content, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_configs(content)


def test_numbers_that_yaml_reads_as_text(tmp_path):
    config = load_configs(write(tmp_path, "residual_diff_threshold: 12e-2"))["cache_config"]
    assert config.residual_diff_threshold == 0.12
    assert isinstance(config.residual_diff_threshold, float)


def test_calibrators():
    assert calibrator(enable_taylorseer=False, taylorseer_order=2) is None
    assert calibrator() is None
    assert calibrator(enable_dmd=False, enable_foca=False, enable_taylorseer=True).taylorseer_order == 1
    assert calibrator(enable_dmd=True, dmd_history=5) == cachedit.DMDCalibratorConfig(dmd_history=5)
    assert calibrator(enable_foca=True, enable_encoder_foca=True) == cachedit.FoCaCalibratorConfig()
    full = calibrator(enable_taylorseer=True, enable_encoder_taylorseer=True, taylorseer_cache_type="hidden_states")
    assert full == TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states")
    assert calibrator(enable_taylorseer=True, calibrator_cache_type="hidden_states").calibrator_cache_type[0] == "h"


def test_options_without_effect_are_logged(caplog):
    with caplog.at_level(logging.WARNING, "cachedit"):
        calibrator(enable_taylorseer=False, taylorseer_order=2)
        assert not caplog.messages
        calibrator(taylorseer_order=2)
    assert caplog.messages == ["cache_config: taylorseer_order has no effect without enable_taylorseer"]


def test_single_sections(tmp_path):
    path = write(tmp_path, json.dumps(EVERYTHING))
    for source in (path, EVERYTHING):
        assert cachedit.load_parallelism_config(source) == PARALLELISM
        assert cachedit.load_attn_backend_config(source) == "native"
        assert cachedit.load_quantize_config(source) == QUANTIZATION
        assert cachedit.load_parallelism_config(source, check_only=True) is True
    flat = {"Fn_compute_blocks": 2}
    assert cachedit.load_parallelism_config(flat, check_only=True) is False
    for load in (cachedit.load_parallelism_config, cachedit.load_attn_backend_config, cachedit.load_quantize_config):
        assert load(flat) is None
        with pytest.raises(ValueError, match=r"attention_backnd: did you mean attention_backend\?"):
            load({"attention_backnd": "native", "cache_config": {}})


def test_load_options_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use load_configs") as caught:
        options = load_options({"Fn_compute_blocks": 2})
    assert caught[0].filename == __file__
    assert options == {"cache_config": DBCacheConfig(Fn_compute_blocks=2)}
    with pytest.warns(DeprecationWarning):
        options = load_options(EVERYTHING, reset=True)
    assert list(options) == ["cache_config", "calibrator_config"]
    assert options["cache_config"].Fn_compute_blocks is None


def test_loading_warns_of_nothing_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_configs(EVERYTHING)


def test_a_name_is_resolved_per_request():
    config = cache(steps_computation_mask="fast")
    assert config.resolve_mask(8) == [1, 1, 1, 0, 1, 0, 0, 1]
    assert len(config.resolve_mask(28)) == 28


def test_the_example_enables_a_transformer():
    configs = load_cache_config(ROOT / "examples" / "cache.yaml")
    assert configs[0].steps_computation_mask == "fast"
    model = tiny_flux()
    cachedit.enable_cache(model, *configs)
    changes, _ = load_cache_config({"num_inference_steps": 8, "residual_diff_threshold": 10}, reset=True)
    cachedit.refresh_context(model, changes)
    with torch.no_grad():
        for step in range(8):
            model(**flux_inputs(step, 8))
    (stats,) = cachedit.summary(model, logging=False)
    assert stats.cached_steps
    assert set(stats.cached_steps) <= {3, 5, 6}  # the zeros of the mask for 8 steps


def test_dbprune_has_keys_of_its_own():
    section = {"cache_type": "DBPrune", "non_prune_block_ids": [3], "enable_dynamic_prune_threshold": True}
    config, _ = load_cache_config({"cache_config": section})
    assert config == DBPruneConfig(non_prune_block_ids=[3], enable_dynamic_prune_threshold=True)
    assert config.cache_type is CacheType.DBPrune
