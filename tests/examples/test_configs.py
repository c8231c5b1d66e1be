"""Each file in examples/configs loads, and means what the guides of SGLang and cache_dit say of it."""

from pathlib import Path

import pytest

import cachedit
from cachedit import (
    DBCacheConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    ParallelismConfig,
    QuantizeConfig,
    TaylorSeerCalibratorConfig,
    load_configs,
)
from stand_ins import apply, flux, ranks

FOLDER = Path(__file__).parents[2] / "examples" / "configs"


def cache(**fields):
    common = {"max_warmup_steps": 8, "warmup_interval": 2, "max_cached_steps": -1, "max_continuous_cached_steps": 2}
    return DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.12, **common, **fields)


def parallel(**fields):
    return ParallelismConfig(**{"ulysses_size": "auto", "attention_backend": "native", **fields})


TAYLORSEER = TaylorSeerCalibratorConfig(taylorseer_order=1, enable_encoder_calibrator=False)
MASKED = {"num_inference_steps": 28, "steps_computation_mask": "fast"}
EXTRA = {"extra_parallel_modules": ["text_encoder", "vae"]}
QUANTIZE = {"quant_type": "float8", "exclude_layers": ["embedder", "embed"], "verbose": False}
QUANTIZE_EXTRA = {
    "components_to_quantize": {
        "transformer": {"quant_type": "float8_per_row", "exclude_layers": ["embedder", "embed"]},
        "text_encoder_2": {"quant_type": "float8_weight_only", "exclude_layers": ["shared", "embed_tokens"]},
    },
    "verbose": False,
}
MEANING = {
    "attention": {"attention_backend": "flash"},
    "cache": {"cache_config": cache(), "calibrator_config": TAYLORSEER},
    "cache_dmd": {
        "cache_config": cache(),
        "calibrator_config": DMDCalibratorConfig(dmd_history=6, dmd_svd_precision="medium"),
    },
    "cache_foca": {
        "cache_config": cache(),
        "calibrator_config": FoCaCalibratorConfig(enable_encoder_calibrator=False),
    },
    "cache_mask": {"cache_config": cache(**MASKED), "calibrator_config": TAYLORSEER},
    "cache_mask_cfg": {"cache_config": cache(**MASKED, enable_separate_cfg=True), "calibrator_config": TAYLORSEER},
    "combined": {
        "cache_config": cache(),
        "calibrator_config": TAYLORSEER,
        "parallelism_config": parallel(**EXTRA),
        "quantize_config": QuantizeConfig(**QUANTIZE),
    },
    "hybrid": {"cache_config": cache(), "calibrator_config": TAYLORSEER, "parallelism_config": parallel(**EXTRA)},
    "parallel": {"parallelism_config": parallel()},
    "parallel_2d": {"parallelism_config": parallel(tp_size=2)},
    "parallel_3d": {"parallelism_config": parallel(ulysses_size=2, ring_size=2, tp_size=2)},
    "parallel_async": {"parallelism_config": parallel(ulysses_async=True)},
    "parallel_extra": {"parallelism_config": parallel(**EXTRA)},
    "parallel_fp8": {"parallelism_config": parallel(ulysses_float8=True)},
    "parallel_uaa": {"parallelism_config": parallel(ulysses_anything=True)},
    "parallel_usp": {"parallelism_config": parallel(ring_size=2)},
    "quantize": {"quantize_config": QuantizeConfig(**QUANTIZE)},
    "quantize_extra": {"quantize_config": QuantizeConfig(**QUANTIZE_EXTRA)},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.iterdir()))
def test_what_each_file_means(name):
    sections = ("cache_config", "calibrator_config", "parallelism_config", "attention_backend", "quantize_config")
    assert load_configs(FOLDER / f"{name}.yaml") == dict.fromkeys(sections) | MEANING[name]


def test_there_is_a_file_for_each_meaning():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in MEANING}


@pytest.mark.parametrize("name", ["cache.yaml", *sorted(f"configs/{path.name}" for path in FOLDER.iterdir())])
def test_each_file_is_applied(name):
    """Without the sections that need a GPU or a package; see stand_ins.REFUSED."""
    with ranks(8):
        apply(flux(), load_configs(FOLDER.parent / name))


AUTO = [("parallel", 4, (4, 1, 1)), ("parallel_2d", 8, (4, 1, 2)), ("parallel_usp", 8, (4, 2, 1))]


@pytest.mark.parametrize(("name", "world", "sizes"), [*AUTO, ("parallel_3d", 8, (2, 2, 2))])
def test_what_auto_comes_to(name, world, sizes):
    found = load_configs(FOLDER / f"{name}.yaml")["parallelism_config"].sizes(world)
    assert (found.ulysses, found.ring, found.tp) == sizes


def test_a_mask_by_name_is_the_one_of_the_guide():
    config = load_configs(FOLDER / "cache_mask.yaml")["cache_config"]
    assert config.resolve_mask(28) == cachedit.steps_mask(mask_policy="fast", total_steps=28)


def test_the_guides_misspelling(caplog):
    given = {"cache_config": {"enable_sperate_cfg": True}}
    assert load_configs(given)["cache_config"] == DBCacheConfig(enable_separate_cfg=True)
    assert "cache_config: enable_sperate_cfg: read as enable_separate_cfg" in caplog.text


def test_older_form_of_the_extra_modules():
    """As SGLang's guide had it before the settings moved up a level."""
    kwargs = {"attention_backend": "native", "extra_parallel_modules": ["text_encoder", "vae"]}
    given = {"parallelism_config": {"ulysses_size": "auto", "parallel_kwargs": kwargs}}
    assert load_configs(given)["parallelism_config"].extra_parallel_modules == ["text_encoder", "vae"]
