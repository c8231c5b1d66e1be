"""What ``compare_cache_dit.py`` runs: pipelines and policies, whose names and fields are the same in both packages.

A case or a model with ``differs`` may come out differently: it names the section of docs/differences.md that says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cachedit.embedded import load_pipeline

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from pipelines import build

STEPS = 20


@dataclass(frozen=True)
class Model:
    """A pipeline.

    Args:
        name: Shown in the table.
        build: Returns the pipeline, the class name that cache_dit knows it by, and a function that runs it.
        threshold: A residual_diff_threshold that some steps are below and some above. Random weights move far.
        prune_threshold: The same for DBPrune, which measures block inputs.
        differs: Section of docs/differences.md, if the packages are meant to differ on it.
    """

    name: str
    build: Callable[[], tuple[Any, str, Callable[[Any], torch.Tensor]]]
    threshold: float
    prune_threshold: float
    differs: str = ""


def embedded(dtype: torch.dtype) -> tuple[Any, str, Callable[[Any], torch.Tensor]]:
    pipe = load_pipeline(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def run(pipe: Any) -> torch.Tensor:
        prompt = "a red circle left of a blue square"
        result: torch.Tensor = pipe(prompt, num_inference_steps=STEPS, latents=noise, output_type="latent").images
        return result.float()

    return pipe, "FluxPipeline", run


def tiny(name: str, guided: bool) -> tuple[Any, str, Callable[[Any], torch.Tensor]]:
    small = build(name)
    original = small.pipe

    def run(pipe: Any) -> torch.Tensor:
        small.pipe = pipe
        return small(STEPS, guided=guided)

    return original, name.partition(",")[0], run


MODELS = [
    Model("embedded", lambda: embedded(torch.float32), 0.15, 0.1),
    Model("embedded, bfloat16", lambda: embedded(torch.bfloat16), 0.15, 0.1, "low precision"),
    Model("Flux", lambda: tiny("FluxPipeline", False), 0.45, 0.18),
    Model("Flux, guided", lambda: tiny("FluxPipeline", True), 0.45, 0.18, "guidance branches"),
    Model("Qwen-Image", lambda: tiny("QwenImagePipeline", True), 0.5, 0.2),
    Model("Qwen-Image, unguided", lambda: tiny("QwenImagePipeline", False), 0.5, 0.2, "guidance branches"),
    Model("Wan 2.2", lambda: tiny("WanPipeline + two transformers", True), 0.1, 0.08),
]
GUIDED, UNGUIDED = ("Qwen-Image", "Wan 2.2"), ("embedded", "Flux")
ALL = UNGUIDED + GUIDED
HALF = (*ALL, "embedded, bfloat16")


@dataclass(frozen=True)
class Case:
    """A policy.

    Args:
        name: Shown in the table.
        cache: Fields of the cache configuration besides those of ``BASE``; a mask given by name is made by each
            package's own ``steps_mask``.
        calibrator: Class name and fields of the calibrator configuration; None for plain reuse.
        prunes: DBPrune instead of DBCache.
        models: Names of the models it is run on.
        differs: Section of docs/differences.md, if the packages are meant to differ.
    """

    name: str
    cache: dict[str, Any] = field(default_factory=dict)
    calibrator: tuple[str, dict[str, Any]] | None = None
    prunes: bool = False
    models: tuple[str, ...] = ALL
    differs: str = ""


BASE = {"Fn_compute_blocks": 1, "max_warmup_steps": 5}
TAIL = {"Bn_compute_blocks": 1}  # the last block mixes the streams, so that the encoder's forecast shows in the output
STATIC = {"steps_computation_policy": "static"}
SHORT_WARMUP_MASK = [1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1]
PAIRS = [1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
ALTERNATE = [1, 1, 1, 1, *[0, 1] * 8]


def taylor(order: int, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "TaylorSeerCalibratorConfig", {"taylorseer_order": order, **fields}


FOCA, DMD = ("FoCaCalibratorConfig", {}), ("DMDCalibratorConfig", {})

CASES = [
    Case("F1B0", models=tuple(model.name for model in MODELS)),
    Case("F2B1", {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}, models=HALF),
    Case("no warm-up", {"max_warmup_steps": 0}),
    Case("every second warm-up step", {"max_warmup_steps": 6, "warmup_interval": 2}),
    Case("max_cached_steps 4", {"max_cached_steps": 4}),
    Case("max_continuous_cached_steps 1", {"max_continuous_cached_steps": 1}),
    Case("max_continuous_cached_steps 2", {"max_continuous_cached_steps": 2}),
    Case("static mask medium", {"steps_computation_mask": "medium", **STATIC}, models=HALF),
    Case("dynamic mask fast", {"steps_computation_mask": "fast"}),
    Case("static mask that cuts the warm-up", {"steps_computation_mask": SHORT_WARMUP_MASK, **STATIC}),
    Case("dynamic mask, limited runs", {"steps_computation_mask": "ultra", "max_continuous_cached_steps": 1}),
    Case("one difference for both branches", {"cfg_diff_compute_separate": False}, models=GUIDED),
    Case("TaylorSeer 1", TAIL, taylor(1), models=HALF),
    Case("TaylorSeer 2", {"max_warmup_steps": 6, **TAIL}, taylor(2), models=HALF),
    Case("TaylorSeer 1, hidden states", TAIL, taylor(1, calibrator_cache_type="hidden_states")),
    Case(
        "TaylorSeer 1, plain encoder", TAIL, taylor(1, enable_encoder_calibrator=False), models=("Flux", "Qwen-Image")
    ),
    Case("TaylorSeer 1, static mask", {"steps_computation_mask": "medium", **STATIC}, taylor(1)),
    Case("FoCa, pairs of computed steps", {"steps_computation_mask": PAIRS, **STATIC, **TAIL}, FOCA),
    Case("start over at step 10", {"force_refresh_step_hint": 10}, models=UNGUIDED),
    Case(
        "start over each 5 steps",
        {"force_refresh_step_hint": 5, "force_refresh_step_policy": "repeat", "max_warmup_steps": 2},
        models=UNGUIDED,
    ),
    Case("DBPrune", prunes=True, models=HALF),
    Case("DBPrune, exempt blocks", {"non_prune_block_ids": [2], **TAIL}, prunes=True),
    Case("DBPrune, TaylorSeer 1", {}, taylor(1), prunes=True, models=HALF),
    Case("DBPrune, dynamic threshold", {"enable_dynamic_prune_threshold": True}, prunes=True, models=UNGUIDED),
    Case("DBPrune, limited runs", {"max_continuous_cached_steps": 1}, prunes=True),
    Case("DBPrune, dynamic mask", {"steps_computation_mask": "fast"}, prunes=True),
    Case("DBPrune, static mask", {"steps_computation_mask": "fast", **STATIC}, prunes=True),
    # From here on they are meant to differ.
    Case("accumulated difference", {"max_accumulated_residual_diff_threshold": 0.25}, differs="accumulated difference"),
    Case("TaylorSeer 1, short warm-up", {"max_warmup_steps": 3}, taylor(1), differs="first derivatives"),
    Case("TaylorSeer 2, short warm-up", {"max_warmup_steps": 4}, taylor(2), differs="first derivatives"),
    Case("FoCa, alternate steps", {"steps_computation_mask": ALTERNATE, **STATIC}, FOCA, differs="FoCa"),
    Case("DMD", {"max_warmup_steps": 6}, DMD, differs="DMD"),
    Case("start over, guided", {"force_refresh_step_hint": 10}, models=GUIDED, differs="force_refresh_step_hint"),
    Case(
        "DBPrune, dynamic threshold, guided",
        {"enable_dynamic_prune_threshold": True},
        prunes=True,
        models=GUIDED,
        differs="dynamic prune threshold",
    ),
    Case("DBPrune, max_cached_steps 3", {"max_cached_steps": 3}, prunes=True, differs="max_cached_steps with DBPrune"),
]
