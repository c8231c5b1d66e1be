"""Small pipelines on 2 and 4 gloo ranks: equal to one process, with and without the cache, at a counted price."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

import cachedit
from cachedit import (
    DBCacheConfig,
    DBPruneConfig,
    DMDCalibratorConfig,
    ParallelismConfig,
    TaylorSeerCalibratorConfig,
    TeaCacheConfig,
)
from cachedit.models import find_transformers
from counts import COLLECTIVES, Operators
from pipelines import build
from ranks import run_ranks

STEPS = 8
PIPELINES = ("FluxPipeline", "QwenImagePipeline", "WanPipeline")


class Scheme(NamedTuple):
    name: str
    world: int
    settings: dict[str, Any]
    policies: tuple[str, ...] = ()
    bound: float = 1e-4  # of the largest difference, relative to the output's largest value


SCHEMES = [
    Scheme("Ulysses", 2, {"ulysses_size": 2}, ("DBCache", "mask, DMD", "DBPrune", "TeaCache")),
    Scheme("Ulysses in FP8", 2, {"ulysses_size": "auto", "ulysses_float8": True}, bound=0.05),
    Scheme("ring", 2, {"ring_size": 2}),
    Scheme("ring, all-gather", 2, {"ring_size": 2, "ring_rotate_method": "allgather", "ring_convert_to_fp32": False}),
    Scheme("Ulysses, nothing divides", 4, {"ulysses_size": 4}),
    Scheme("Ulysses x ring", 4, {"ulysses_size": 2, "ring_size": "auto"}, ("DBCache",)),
    Scheme("tensor", 2, {"tp_size": "auto"}, ("DBCache",)),
    Scheme("Ulysses x tensor", 4, {"ulysses_size": "auto", "tp_size": 2, "ulysses_float8": True}, bound=0.05),
]  # those that cut weights last: there is no way back


class Policy(NamedTuple):
    cache: Any
    calibrator: Any = None


POLICIES = {
    "DBCache": Policy(
        DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.45, max_warmup_steps=2),
        TaylorSeerCalibratorConfig(),
    ),
    "mask, DMD": Policy(
        DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=0, steps_computation_mask="slow",
                      steps_computation_policy="static"),
        DMDCalibratorConfig(),
    ),
    "DBPrune": Policy(DBPruneConfig(Fn_compute_blocks=1, residual_diff_threshold=0.35, max_warmup_steps=2)),
    "TeaCache": Policy(TeaCacheConfig(rel_l1_thresh=0.6, coefficients=[1.0, 0.0])),
}  # fmt: skip


def decisions(pipe: Any) -> list[Any]:
    stats = cachedit.summary(pipe, logging=False)
    return [(s.cached_steps, s.cfg_cached_steps, s.pruned_steps, s.actual_blocks) for s in stats]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def on_a_rank(world: int) -> dict[Any, Any]:
    """All schemes of this number of ranks, without and with the cache: errors, decisions, what is left behind."""
    results: dict[Any, Any] = {}
    for name in PIPELINES:
        tiny = build(name)
        single = {"": (tiny(STEPS), None)}
        for policy in {policy for scheme in SCHEMES if scheme.world == world for policy in scheme.policies}:
            cachedit.enable_cache(tiny.pipe, *POLICIES[policy])
            single[policy] = tiny(STEPS), decisions(tiny.pipe)
            cachedit.disable_cache(tiny.pipe)
        before = [vars(module).keys() for t in find_transformers(tiny.pipe) for module in t.modules()]
        for scheme in SCHEMES:
            if scheme.world != world:
                continue
            config = ParallelismConfig(**scheme.settings)
            cachedit.enable_cache(tiny.pipe, parallelism_config=config)
            results[name, scheme.name, ""] = difference(tiny(STEPS), single[""][0]), None, None
            for policy in scheme.policies:
                cachedit.enable_cache(tiny.pipe, *POLICIES[policy])
                error = difference(tiny(STEPS), single[policy][0])
                results[name, scheme.name, policy] = error, decisions(tiny.pipe), single[policy][1]
            cachedit.disable_cache(tiny.pipe)
            if "tp_size" in scheme.settings:
                continue
            same = torch.equal(tiny(STEPS), single[""][0])
            after = [vars(module).keys() for t in find_transformers(tiny.pipe) for module in t.modules()]
            results[name, scheme.name, "undone"] = same and before == after
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ran(request):
    return request.param, run_ranks(on_a_rank, request.param, request.param, seconds=400)


def results_of(ran: Any) -> list[dict[Any, Any]]:
    for result in ran[1]:
        assert isinstance(result, dict), result
    return ran[1]


def test_equal_to_one_process(ran):
    for rank, results in enumerate(results_of(ran)):
        for scheme in SCHEMES:
            for name in PIPELINES if scheme.world == ran[0] else ():
                error = results[name, scheme.name, ""][0]
                assert error < scheme.bound, (rank, name, scheme.name, error)
                assert scheme.bound < 1e-3 or error > 1e-4, f"{scheme.name}: nothing was rounded"
                assert results.get((name, scheme.name, "undone"), True), (rank, name, scheme.name)


def test_the_cache_decides_alike_on_all_ranks_and_as_in_one_process(ran):
    everywhere = results_of(ran)
    reused = Counter()
    for key in everywhere[0]:
        if key[2] not in POLICIES:
            continue
        error, decided, single = everywhere[0][key]
        assert error < 1e-4, (key, error)
        assert all(results[key][1] == decided for results in everywhere), key
        assert decided == single, key
        reused[key[2]] += sum(bool(cached or pruned) for cached, _, pruned, _ in decided)
    assert reused and all(reused.values()), f"nothing was ever reused: {reused}"


def counts_on_a_rank() -> tuple[Any, ...]:
    tiny = build("FluxPipeline")
    (transformer,) = find_transformers(tiny.pipe)
    layers = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    forwards: list[int] = []
    transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = []
    for cache in (None, DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=9.0, max_warmup_steps=1)):
        config = ParallelismConfig(ulysses_size=2, ulysses_float8=True)
        cachedit.enable_cache(tiny.pipe, cache, parallelism_config=config)
        forwards.clear()
        with Operators("cachedit", *COLLECTIVES) as operators:
            tiny(2)
        found.append((len(forwards), operators.counts))
        cachedit.disable_cache(tiny.pipe)
    return layers, *found


def test_price_of_a_layer_and_of_a_decision():
    for layers, (forwards, plain), (again, cached) in run_ranks(counts_on_a_rank, 2):
        assert forwards == again
        computed = forwards * layers
        # Two exchanges a layer and one gather at the end: no sizes are asked for.
        assert plain == {
            "cachedit::ulysses_pack": 2 * computed,
            "_c10d_functional::all_to_all_single": 2 * computed,
            "cachedit::ulysses_unpack": 2 * computed,
            "c10d::_allgather_base_": forwards,
        }
        branches = forwards // 2
        assert cached["c10d::allreduce_"] == branches  # the second step's decision
        assert cached["_c10d_functional::all_to_all_single"] == branches * 2 * (layers + 1)  # of it, the head alone


def refusals_on_a_rank() -> list[str]:
    """What each rank is told where one of them, or all, can't go on; and whether anything was changed."""
    rank, told = dist.get_rank(), []
    tiny = build("FluxPipeline")
    baseline = tiny(2)

    def refused(cache: Any, **settings: Any) -> None:
        try:
            cachedit.enable_cache(tiny.pipe, cache, parallelism_config=ParallelismConfig(**settings))
            told.append("nothing")
        except (ValueError, TypeError) as error:
            told.append(f"{type(error).__name__}: {error}")

    refused(None, ulysses_size=3)
    refused(None, ulysses_size=2, ulysses_float8=bool(rank))
    refused(None, ring_size=2, attention_backend="xformers")
    refused(None, ulysses_size=2, attention_backend="flash5")
    refused(DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.1 + rank), ulysses_size=2)
    refused(DBCacheConfig(Fn_compute_blocks=99 if rank == 1 else 1), ulysses_size=2)
    refused(TeaCacheConfig(Fn_compute_blocks=1, metric="sea"), ulysses_size=2)
    refused(None, ulysses_size=2, cp_plan={"nowhere": {"hidden_states": None}})
    refused(None, ulysses_size=2, extra_parallel_modules=["vea"])
    told.append(str(torch.equal(tiny(2), baseline) and not hasattr(tiny.pipe.transformer, "_cachedit_parallel")))
    return told


def test_errors_reach_every_rank_and_change_nothing():
    expected = [
        ("must be the number of ranks, 2",) * 2,
        ("ranks have different values of ulysses_float8: rank 0: False; rank 1: True",) * 2,
        ("for ring attention, got 'xformers'",) * 2,
        ("attention_backend must be one of flash, flash_hub",) * 2,
        ("ranks have different values of cache",) * 2,
        ("not enabled, as rank 1: ValueError: Fn_compute_blocks", "ValueError: Fn_compute_blocks + Bn_compute_blocks"),
        ("metric must be",) * 2,
        ("cp_plan: FluxTransformer2DModel has no module 'nowhere'",) * 2,
        ("extra_parallel_modules: FluxPipeline has no 'vea'",) * 2,
        ("True",) * 2,
    ]
    told = run_ranks(refusals_on_a_rank, 2)
    for i, messages in enumerate(expected):
        for rank, message in enumerate(messages):
            assert message in told[rank][i], (i, rank, told[rank] if isinstance(told[rank], str) else told[rank][i])


def backend_on_a_rank() -> tuple[float, Any]:
    """A backend of its own for what is left to each rank."""
    tiny = build("FluxPipeline")
    baseline = tiny(2)
    config = ParallelismConfig(ulysses_size=2, attention_backend="_native_math")
    cachedit.enable_cache(tiny.pipe, parallelism_config=config)
    cachedit.enable_cache(tiny.pipe, parallelism_config=config)
    error = difference(tiny(2), baseline)
    cachedit.disable_cache(tiny.pipe)
    used = {str(p._attention_backend.value) for p in tiny.pipe.transformer.attn_processors.values()}
    return error, used


def test_attention_backend():
    for error, used in run_ranks(backend_on_a_rank, 2):
        assert error < 1e-4 and used == {"_native_math"}


def three_dimensions_on_a_rank() -> float:
    tiny = build("FluxPipeline")
    baseline = tiny(4)
    config = ParallelismConfig(ulysses_size=2, ring_size=2, tp_size="auto")
    cachedit.enable_cache(tiny.pipe, parallelism_config=config)
    return difference(tiny(4), baseline)


def test_three_dimensions():
    errors = run_ranks(three_dimensions_on_a_rank, 8, seconds=240)
    assert all(isinstance(error, float) and error < 1e-4 for error in errors), errors


def extras_on_a_rank() -> dict[str, Any]:
    """A VAE and a text encoder of a pipeline, beside its transformer; a second time, another scheme."""
    tiny = build("FluxPipeline")
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2).eval()  # fmt: skip
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 32}
    encoder = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    tiny.pipe.register_modules(vae=vae, text_encoder_2=encoder)
    vae.enable_tiling()
    latents, tokens = torch.randn(1, 4, 40, 40), torch.arange(12)[None]
    with torch.no_grad():
        image, states, size = vae.decode(latents).sample, encoder(tokens)[0], weight_bytes(encoder)
        modules = ["vae", encoder]
        config = ParallelismConfig(ulysses_size=2, extra_parallel_modules=modules)
        cachedit.enable_cache(tiny.pipe, parallelism_config=config)
        cachedit.enable_cache(tiny.pipe, parallelism_config=config.update(ring_size=2, ulysses_size=1))
        found = {
            "image": torch.equal(vae.decode(latents).sample, image),
            "states": difference(encoder(tokens)[0], states),
            "share": weight_bytes(encoder) / size,
        }
        tiles = "decode" in vars(vae)
        cachedit.disable_cache(tiny.pipe)
        found["tiles"] = tiles and "decode" not in vars(vae) and torch.equal(vae.decode(latents).sample, image)
    return found


def weight_bytes(module: torch.nn.Module) -> int:
    """On this rank."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in module.parameters())


def test_other_modules_of_the_pipeline():
    for found in run_ranks(extras_on_a_rank, 2):
        assert not isinstance(found, str), found
        assert found["image"] and found["tiles"] and found["states"] < 1e-4 and found["share"] < 0.7, found


def groups_on_a_rank() -> tuple[float, Any, Any]:
    """Two groups of two in one world of four, with requests of their own and thresholds of their own."""
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = rank // 2
    tiny = build("FluxPipeline")
    cache = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=(0.3, 9.0)[half], max_warmup_steps=2)
    cachedit.enable_cache(tiny.pipe, cache)
    single, decided = tiny(STEPS + half), decisions(tiny.pipe)
    config = ParallelismConfig(ulysses_size=2, process_group=halves[half])
    cachedit.enable_cache(tiny.pipe, cache, parallelism_config=config)
    return difference(tiny(STEPS + half), single), decisions(tiny.pipe), decided


def test_groups_of_one_world_do_not_wait_for_each_other():
    found = run_ranks(groups_on_a_rank, 4)
    for result in found:
        assert not isinstance(result, str), result
        error, decided, single = result
        assert error < 1e-4 and decided == single
    assert found[0][1] != found[2][1]


def failing_on_a_rank(how: str) -> str:
    tiny = build("FluxPipeline")
    cachedit.enable_cache(tiny.pipe, parallelism_config=ParallelismConfig(ulysses_size=2))
    calls = Counter()

    def fail(module: Any, args: Any) -> None:
        calls["forward"] += 1
        if dist.get_rank() == 1 and calls["forward"] == 3:
            if how == "dies":
                os._exit(1)
            raise MemoryError("out of memory, let us say")

    tiny.pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(fail)
    start = time.monotonic()
    try:
        tiny(4)
    except MemoryError:
        os._exit(1)  # what a launcher would do
    except RuntimeError:
        return f"failed after {time.monotonic() - start:.0f}"
    return "went on"


@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_rank_that_fails_does_not_leave_the_others_hanging(how):
    found = run_ranks(failing_on_a_rank, 2, how, collective=8, seconds=90)
    assert found[1] == "the process has died"
    assert found[0].startswith("failed after ") and int(found[0].split()[-1]) < 20, found[0]
