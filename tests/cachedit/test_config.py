import dataclasses

import pytest

from cachedit import (
    CacheType,
    CalibratorConfig,
    DBCacheConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    TaylorSeerCalibratorConfig,
)


def test_defaults_are_the_ones_users_know():
    assert DBCacheConfig().as_dict() == {
        "cache_type": CacheType.DBCache,
        "Fn_compute_blocks": 8,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": 0.08,
        "max_accumulated_residual_diff_threshold": None,
        "max_warmup_steps": 8,
        "warmup_interval": 1,
        "max_cached_steps": -1,
        "max_continuous_cached_steps": -1,
        "enable_separate_cfg": None,
        "cfg_compute_first": False,
        "cfg_diff_compute_separate": True,
        "num_inference_steps": None,
        "steps_computation_mask": None,
        "steps_computation_policy": "dynamic",
        "force_refresh_step_hint": None,
        "force_refresh_step_policy": "once",
        "residual_float8": False,
    }
    calibrator = TaylorSeerCalibratorConfig()
    assert (calibrator.enable_calibrator, calibrator.enable_encoder_calibrator, calibrator.taylorseer_order) == (
        True,
        True,
        1,
    )


def test_update_skips_none_and_refuses_unknown_names():
    config = DBCacheConfig().update(Fn_compute_blocks=2, Bn_compute_blocks=None)
    assert (config.Fn_compute_blocks, config.Bn_compute_blocks) == (2, 0)
    with pytest.raises(TypeError, match=r"DBCacheConfig has no field 'Fn'; fields are Bn_compute_blocks, "):
        config.update(Fn=2)


def test_reset_empties_all_fields():
    config = DBCacheConfig().reset(num_inference_steps=28)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert values.pop("num_inference_steps") == 28
    assert set(values.values()) == {None}


@pytest.mark.parametrize("name", ["Fn_compute_blocks", "max_warmup_steps", "warmup_interval", "max_cached_steps"])
@pytest.mark.parametrize("value", [1.5, "2", True, None])
def test_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got"):
        DBCacheConfig(**{name: value}).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Fn_compute_blocks", 0),
        ("Bn_compute_blocks", -1),
        ("max_warmup_steps", -1),
        ("warmup_interval", 0),
        ("max_cached_steps", -2),
        ("max_continuous_cached_steps", -2),
        ("num_inference_steps", 0),
        ("force_refresh_step_hint", 0),
    ],
)
def test_ranges(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1}, got {value}"):
        DBCacheConfig(**{name: value}).validate()


@pytest.mark.parametrize("order", [0, 5])
def test_taylorseer_order(order):
    with pytest.raises(ValueError, match=f"taylorseer_order must be from 1 to 4, got {order}"):
        TaylorSeerCalibratorConfig(taylorseer_order=order).validate()


def test_calibrator_cache_type():
    with pytest.raises(ValueError, match="calibrator_cache_type must be one of 'residual', 'hidden_states', got 'x'"):
        CalibratorConfig(calibrator_cache_type="x").validate()


def test_mask_by_name_needs_a_count_to_resolve():
    config = DBCacheConfig(steps_computation_mask="slow")
    assert config.resolve_mask(None) is None
    assert config.resolve_mask(8) == [1, 1, 1, 1, 1, 0, 1, 1]
    with pytest.raises(ValueError, match="from 8 steps up, got 5"):
        config.resolve_mask(5)


def test_strify():
    config = DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask=[1, 0], num_inference_steps=2)
    assert config.strify() == "DBCache_F1B0_W8I1M0MC0_R0.08_SCM10_dynamic_N2"
    assert TaylorSeerCalibratorConfig(taylorseer_order=2).strify() == "T1O2"
    assert TaylorSeerCalibratorConfig().strify(details=True) == "TaylorSeer_O(1)"


def test_hermite():
    config = HermiteCalibratorConfig()
    config.validate()
    assert (config.calibrator_type, config.hermite_order, config.hermite_sigma) == ("hermite", 2, 0.5)
    assert (config.strify(), config.strify(details=True)) == ("HO2S0.5", "Hermite_O(2, 0.5)")
    with pytest.raises(ValueError, match="hermite_order must be from 1 to 4, got 5"):
        HermiteCalibratorConfig(hermite_order=5).validate()
    for sigma in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="hermite_sigma must be above 0 and at most 1, got"):
            HermiteCalibratorConfig(hermite_sigma=sigma).validate()
    with pytest.raises(TypeError, match="hermite_sigma must be a number, got 'x'"):
        HermiteCalibratorConfig(hermite_sigma="x").validate()


def test_foca():
    config = FoCaCalibratorConfig()
    config.validate()
    assert (config.calibrator_type, config.enable_calibrator, config.enable_encoder_calibrator) == ("foca", True, True)
    assert config.strify() == "FoCa"


def test_dmd():
    config = DMDCalibratorConfig()
    config.validate()
    assert (config.calibrator_type, config.enable_calibrator, config.enable_encoder_calibrator) == ("dmd", True, True)
    settings = (config.dmd_history, config.dmd_rank, config.dmd_ridge, config.dmd_svd_precision)
    assert settings == (6, 0, 1e-8, "medium")
    assert (config.strify(), config.strify(details=True)) == ("DMDH6", "DMD_H(6, medium)")
    assert DMDCalibratorConfig(dmd_svd_precision="high", dmd_history=5).strify() == "DMDH5h"
    for name, value, message in [
        ("dmd_history", 3, "from 4 to 16, got 3"),
        ("dmd_rank", -1, "at least 0, got -1"),
        ("dmd_ridge", -1e-9, "at least 0 and finite, got -1e-09"),
        ("dmd_svd_precision", "full", "one of 'low', 'medium', 'high', got 'full'"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be {message}"):
            DMDCalibratorConfig(**{name: value}).validate()


@pytest.mark.parametrize("name", ["DMDCalibratorConfig", "FoCaCalibratorConfig", "TaylorSeerCalibratorConfig"])
def test_names_and_defaults_are_those_of_cache_dit(name):
    peer = getattr(pytest.importorskip("cache_dit.caching.cache_contexts.calibrators"), name)
    ours = getattr(__import__("cachedit_kernels"), name)
    assert ours().as_dict() == peer().as_dict()
