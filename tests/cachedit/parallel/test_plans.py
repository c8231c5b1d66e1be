"""Every family's plan on a small pipeline, on 2 and 4 gloo ranks: equal to one process, with and without a cache."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

import cachedit
from cachedit import DBCacheConfig, ParallelismConfig, TaylorSeerCalibratorConfig
from cachedit.parallel.plans import PLANS, UNSPLIT, find_plan
from pipelines import Tiny, build
from pipelines.common import normal
from ranks import run_ranks

STEPS = 4
BOUND = 1e-4  # of the largest difference, relative to the output's largest value
SCHEMES: dict[int, dict[str, Any]] = {2: {"ulysses_size": 2}, 4: {"ulysses_size": 2, "ring_size": 2}}


class Case(NamedTuple):
    """What a pipeline is called with in place of its usual inputs, and what is split beside its transformer.

    Args:
        inputs: Arguments of every call.
        guided: Further ones.
        extra: ``extra_parallel_modules``.
        on_four: Runs on four ranks, by Ulysses and ring at once; all run on two, by Ulysses.
    """

    inputs: Mapping[str, Any] = MappingProxyType({})
    guided: Mapping[str, Any] = MappingProxyType({})
    extra: tuple[str, ...] = ()
    on_four: bool = False


# Samples of one batch whose texts differ in length, so that the shorter one's padding is masked.
TWO_TEXTS = {"prompt_embeds": normal(2, 5, 16), "prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])}
TWO_OTHERS = {f"negative_{name}": value for name, value in TWO_TEXTS.items()}

CASES = {
    "BriaFiboPipeline": Case(),
    "BriaPipeline": Case(),
    "ChromaPipeline": Case(on_four=True),
    "ChronoEditPipeline": Case(),
    "CogVideoXPipeline": Case(on_four=True),
    "CogVideoXImageToVideoPipeline": Case(),
    "CogView3PlusPipeline": Case(),
    "CogView4Pipeline": Case(),
    "CogView4ControlPipeline": Case(),
    "ConsisIDPipeline": Case(),
    "ErnieImagePipeline": Case(guided={"negative_prompt_embeds": [normal(3, 16)]}, on_four=True),
    "Flux2KleinPipeline": Case(),
    "Flux2Pipeline": Case(),
    "FluxControlNetPipeline": Case(on_four=True),
    "FluxControlPipeline": Case(),
    "FluxFillPipeline": Case(),
    "FluxKontextPipeline": Case(),
    "GlmImagePipeline": Case(),
    "HeliosPipeline": Case(on_four=True),
    "HiDreamImagePipeline": Case(on_four=True),
    "HunyuanImagePipeline": Case(),
    "HunyuanVideo15ImageToVideoPipeline": Case(on_four=True),
    "HunyuanVideoFramepackPipeline": Case(),
    "HunyuanVideoImageToVideoPipeline + token replacement": Case(on_four=True),
    "HunyuanVideoPipeline": Case(),
    "Kandinsky5I2IPipeline": Case(),
    "Kandinsky5T2VPipeline": Case(on_four=True),
    "LTX2ImageToVideoPipeline": Case(on_four=True),
    "LTXConditionPipeline": Case(),
    "LTXPipeline": Case(),
    "LongCatImageEditPipeline": Case(),
    "LongCatImagePipeline": Case(),
    "Lumina2Pipeline": Case(TWO_TEXTS, TWO_OTHERS),
    "MochiPipeline": Case(on_four=True),
    "OvisImagePipeline": Case(),
    "PixArtAlphaPipeline": Case(),
    "PixArtSigmaPipeline": Case(),
    "QwenImageControlNetPipeline": Case(extra=("controlnet",)),
    "QwenImageEditPlusPipeline": Case(),
    "QwenImagePipeline": Case(on_four=True),
    "SkyReelsV2DiffusionForcingPipeline": Case({"num_frames": 13, "ar_step": 1, "causal_block_size": 2}, on_four=True),
    "SkyReelsV2Pipeline": Case(),
    "StableDiffusion3ControlNetPipeline": Case(),
    "StableDiffusion3Pipeline + dual attention": Case(),
    "WanAnimatePipeline": Case(on_four=True),
    "WanImageToVideoPipeline + two transformers": Case(),
    "WanPipeline + a timestep per token": Case(),
    "WanVACEPipeline": Case(),
    "ZImageControlNetPipeline": Case(extra=("controlnet",), on_four=True),
    "ZImagePipeline": Case(guided={"negative_prompt_embeds": [normal(40, 16)]}),
}


class Outcome(NamedTuple):
    """What became of a case on one rank; differences are relative to the largest value of the plain output."""

    error: float
    masks_matter: bool
    cached_error: float
    cache_matters: float
    steps: list[Any]  # cached steps of each transformer
    single: list[Any]  # the same, in one process


def prepare(name: str) -> tuple[Tiny, bool]:
    """The pipeline of a case; masks of its texts exclude the last token, or two. Whether that changes what it gives."""
    case, tiny = CASES[name], build(name)
    tiny.inputs |= case.inputs
    tiny.guided |= case.guided
    masks = [
        (arguments, key)
        for arguments in (tiny.inputs, tiny.guided)
        for key, value in arguments.items()
        if "mask" in key and getattr(value, "ndim", 0) == 2 and bool(value.all())
    ]
    whole = tiny(2) if masks else None
    for arguments, key in masks:
        arguments[key] = arguments[key].clone()
        arguments[key][:, -2 if key.startswith("negative") else -1 :] = 0
    return tiny, whole is None or not torch.equal(tiny(2), whole)


def cache_of(tiny: Tiny) -> tuple[Any, Any]:
    mask = [1 - i % 2 for i in range(tiny.forwards(STEPS))]
    config = DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=0, steps_computation_mask=mask, steps_computation_policy="static"
    )
    return config, TaylorSeerCalibratorConfig()


def cached_steps(pipe: Any) -> list[Any]:
    return [(stats.cached_steps, stats.cfg_cached_steps) for stats in cachedit.summary(pipe, logging=False)]


def on_a_rank(world: int) -> dict[str, Any]:
    """Outcomes by case. After a failure ranks no longer wait for each other: that one is the last."""
    outcomes: dict[str, Any] = {}
    for name, case in CASES.items():
        if world == 4 and not case.on_four:
            continue
        try:
            config = ParallelismConfig(**SCHEMES[world], extra_parallel_modules=[*case.extra])
            outcomes[name] = tuple(outcome(name, config, size=int(world == 4)))  # of plain values, to be sent
        except Exception:
            outcomes[name] = traceback.format_exc()
            break
    return outcomes


def outcome(name: str, config: ParallelismConfig, size: int) -> Outcome:
    tiny, masks_matter = prepare(name)
    plain = tiny(STEPS, size)
    largest = float(plain.abs().max())
    cachedit.enable_cache(tiny.pipe, *cache_of(tiny))
    single, single_steps = tiny(STEPS, size), cached_steps(tiny.pipe)
    cachedit.disable_cache(tiny.pipe)

    cachedit.enable_cache(tiny.pipe, parallelism_config=config)
    error = float((tiny(STEPS, size) - plain).abs().max()) / largest
    cachedit.enable_cache(tiny.pipe, *cache_of(tiny))
    cached_error = float((tiny(STEPS, size) - single).abs().max()) / largest
    cache_matters = float((single - plain).abs().max()) / largest
    return Outcome(error, masks_matter, cached_error, cache_matters, cached_steps(tiny.pipe), single_steps)


@pytest.fixture(scope="module")
def ran() -> dict[int, list[Any]]:
    return {world: run_ranks(on_a_rank, world, world, seconds=300, collective=30) for world in SCHEMES}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_process_with_and_without_a_cache(ran, name):
    for world in SCHEMES if CASES[name].on_four else [2]:
        for rank, outcomes in enumerate(ran[world]):
            assert isinstance(outcomes, dict), outcomes
            assert name in outcomes, f"not reached: {list(outcomes)[-1]} failed"
            assert isinstance(outcomes[name], tuple), outcomes[name]
            found = Outcome(*outcomes[name])
            print(f"{name}, rank {rank} of {world}: {found.error:.1e}, cached {found.cached_error:.1e}")
            assert found.error < BOUND and found.cached_error < BOUND
            assert found.steps == found.single and found.steps[0][0]
            assert found.cache_matters > 10 * BOUND and found.masks_matter


def test_every_row_is_run():
    split = set()
    for name, case in CASES.items():
        pipe = build(name).pipe
        modules = [pipe.transformer, *(getattr(pipe, extra) for extra in case.extra)]
        split |= {type(module).__name__ for module in modules}
        assert all(find_plan(module) is not None for module in modules)
    assert split >= PLANS.keys()


def unsplit_on_a_rank() -> list[str]:
    told = []
    for name in ("SanaPipeline", "SanaVideoPipeline", "DiTPipeline"):
        try:
            cachedit.enable_cache(build(name).pipe, parallelism_config=ParallelismConfig(ulysses_size=2))
        except ValueError as error:
            told.append(str(error))
    return told


def test_models_that_cannot_be_split():
    for image, video, unknown in run_ranks(unsplit_on_a_rank, 2):
        assert UNSPLIT["SanaTransformer2DModel"] in image and UNSPLIT["SanaVideoTransformer3DModel"] in video
        assert "DiTTransformer2DModel does not run on split sequences: it is not known how" in unknown
    assert not UNSPLIT.keys() & PLANS.keys()


def processors_on_a_rank() -> str:
    tiny = build("PixArtSigmaPAGPipeline")  # sets attention processors of its own, for the time of a call
    cachedit.enable_cache(tiny.pipe, parallelism_config=ParallelismConfig(ulysses_size=2))
    try:
        tiny(1)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_replaced_processors_are_refused():
    for told in run_ranks(processors_on_a_rank, 2):
        assert "its processor was replaced by a PAG" in told
