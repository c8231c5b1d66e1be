"""Tensor parallelism of transformers: two ranks give what one process gives, on a small pipeline of every family."""

from __future__ import annotations

import hashlib
import re
import traceback
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cachedit
from cachedit import DBCacheConfig
from cachedit.models import find_entry, find_transformers
from cachedit.parallel.tensor import check_tensor_parallel, shard_transformer
from counts import COLLECTIVES, Operators, bytes_held
from pipelines import Tiny, build
from pipelines.common import randomise
from ranks import run_ranks

STEPS = 2
FAMILIES = [
    "FluxPipeline",
    "Flux2Pipeline",
    "ChromaPipeline",
    "QwenImagePipeline",
    "QwenImage21Pipeline",
    "ZImagePipeline",
    "StableDiffusion3Pipeline + dual attention",
    "PixArtSigmaPipeline",
    "CogView3PlusPipeline",
    "CogView4Pipeline",
    "HunyuanImagePipeline",
    "OvisImagePipeline",
    "LongCatImagePipeline",
    "GlmImagePipeline",
    "ErnieImagePipeline",
    "Kandinsky5T2IPipeline",
    "HunyuanVideoPipeline",
    "HunyuanVideoFramepackPipeline",
    "HunyuanVideo15Pipeline",
    "CogVideoXPipeline",
    "ConsisIDPipeline",
    "WanPipeline + two transformers",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "WanAnimatePipeline",
    "ChronoEditPipeline",
    "SkyReelsV2Pipeline",
    "LTXPipeline",
    "LTX2Pipeline",
    "LTX2Pipeline + as LTX-2.3",
    "MochiPipeline",
]


RESIZED = {
    "ZImagePipeline": {"dim": 48, "axes_dims": [8, 8, 8]},  # its feed-forwards are 85 wide otherwise
    "LTX2Pipeline + as LTX-2.3": {"rope_type": "split", "gated_attn": True, "audio_gated_attn": True},
}


def build_shardable(name: str) -> Tiny:
    tiny = build(name.removesuffix(" + as LTX-2.3"))
    if name in RESIZED:
        tiny.pipe.transformer = resized(tiny.pipe.transformer, **RESIZED[name])
    for transformer in find_transformers(tiny.pipe):
        for parameter in transformer.parameters():  # a norm with weights of 1 would hide a share of the wrong heads
            if (parameter == 1).all():
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    return tiny


def resized(transformer: Any, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    transformer = type(transformer).from_config({**transformer.config, **config}).eval().requires_grad_(False)
    randomise(transformer)
    return transformer


def bytes_of_blocks(transformers: list[nn.Module]) -> int:
    lists = [t.get_submodule(item.name) for t in transformers for item in sum(find_entry(t).sections, ())]
    return bytes_held(parameter for blocks in lists for parameter in blocks.parameters())


def rank_of_families(names: list[str]) -> dict[str, Any]:
    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("other", "tensor"))
    results = {name: attempt(compare, name, plane["tensor"]) for name in names}
    results["cached"] = attempt(compare_cached, plane["tensor"])
    results["plane"] = attempt(shard_transformer, transformer_of("FluxPipeline"), plane)
    wan = transformer_of("WanPipeline")
    shard_transformer(wan, plane["tensor"])
    results["adapter"] = attempt(wan.load_lora_adapter, {})
    return results


def attempt(function, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()


def compare(name: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Error relative to the largest value, bytes of the blocks' weights, and which collectives there were."""
    tiny = build_shardable(name)
    transformers = find_transformers(tiny.pipe)
    expected, whole = tiny(STEPS), bytes_of_blocks(transformers)
    for transformer in transformers:
        shard_transformer(transformer, mesh)
    with Operators(*COLLECTIVES) as collectives:
        latents = tiny(STEPS)
    error = float((latents - expected).abs().max() / expected.abs().max())
    again = attempt(shard_transformer, transformers[0], mesh)
    return {
        "error": error,
        "whole": whole,
        "held": bytes_of_blocks(transformers),
        "digest": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
        "collectives": dict(collectives.counts),
        "again": again.splitlines()[-1],
    }


def compare_cached(mesh: DeviceMesh) -> dict[str, Any]:
    """The same with a cache: error, and what was reused, before sharding and after."""
    tiny = build_shardable("WanPipeline")
    config = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.08, max_warmup_steps=2)
    cachedit.enable_cache(tiny.pipe, config)
    expected, reused = tiny(8), reused_steps(tiny)
    cachedit.disable_cache(tiny.pipe)
    shard_transformer(tiny.pipe.transformer, mesh)
    cachedit.enable_cache(tiny.pipe, config)
    error = float((tiny(8) - expected).abs().max() / expected.abs().max())
    return {"error": error, "reused": [reused, reused_steps(tiny)]}


def reused_steps(tiny: Tiny) -> list[list[bool]]:
    (stats,) = cachedit.summary(tiny.pipe, logging=False)
    return [[record.reused for record in branch.records] for branch in stats.branches.values()]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    results = run_ranks(rank_of_families, 2, FAMILIES, seconds=240)
    assert all(isinstance(result, dict) for result in results), results
    return results


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_equal_one(ranks, name):
    for outcome in (rank[name] for rank in ranks):
        assert isinstance(outcome, dict), outcome
        print(f"error {outcome['error']:.1e}, {outcome['held']} of {outcome['whole']} bytes of the blocks held")
        assert outcome["error"] < 1e-4
        assert outcome["held"] < 0.9 * outcome["whole"]
    assert ranks[0][name]["digest"] == ranks[1][name]["digest"]  # else caches might decide differently


@pytest.mark.parametrize(
    ("name", "per_forward"),
    [
        # a double block has attention and a feed-forward of two streams, a single block has one output projection
        ("FluxPipeline", 3 * 4 + 3 * 1),
        # two attentions, each with a norm of queries and of keys, and a feed-forward
        ("WanPipeline + two transformers", 4 * (2 * 3 + 1)),
    ],
)
def test_collectives(ranks, name, per_forward):
    """One per pair of linear layers, and one per norm across heads."""
    forwards = STEPS * 2  # with guidance
    assert ranks[0][name]["collectives"] == {"_c10d_functional::all_reduce": forwards * per_forward}


def test_cache_on_top(ranks):
    """Decisions are those of one process, on every rank, and no rank asks another."""
    for outcome in (rank["cached"] for rank in ranks):
        assert isinstance(outcome, dict), outcome
        before, after = outcome["reused"]
        assert before == after
        assert {True, False} == {reused for branch in before for reused in branch}
        assert outcome["error"] < 1e-4


def test_mesh_of_two_dimensions_is_refused(ranks):
    assert "ValueError: mesh: expected one dimension" in ranks[0]["plane"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_sharded_is_not_sharded_again(ranks, name):
    assert re.fullmatch(r"ValueError: this \w+ is sharded already", ranks[0][name]["again"])


def test_what_is_sharded_takes_no_adapters(ranks):
    """As diffusers has it for what it has sharded itself."""
    assert "ValueError: 'WanTransformer3DModel' is sharded with tensor parallelism" in ranks[0]["adapter"]


def untouched(transformer: Any) -> list[Any]:
    values = [(name, type(tensor), tensor.shape, tensor.dtype) for name, tensor in transformer.state_dict().items()]
    heads = [getattr(module, "heads", None) for module in transformer.modules()]
    hooks = [len(module._forward_pre_hooks) for module in transformer.modules()]
    return [values, heads, hooks, [type(module) for module in transformer.modules()]]


def refused(transformer: Any, size: int, match: str) -> None:
    before = untouched(transformer)
    with pytest.raises(ValueError, match=match):
        check_tensor_parallel(transformer, size)
    assert untouched(transformer) == before


def transformer_of(name: str) -> Any:
    return build(name).pipe.transformer


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("FluxPipeline", 3, r"\(3\) must divide the number of attention heads \(2\)"),
        ("WanPipeline", 4, "heads of WanAttention: expected a multiple of 4 ranks, got 2"),
        ("Kandinsky5T2IPipeline", 3, "self_attention.to_query.weight.* 16 along dim 0 is not divisible by 3"),
        ("ZImagePipeline", 2, "feed_forward.w1.*85 along dim 0 is not divisible by 2"),
        ("SanaPipeline", 2, "SanaTransformer2DModel has no tensor-parallel plan; .*WanTransformer3DModel"),
        ("FluxPipeline", 0, "size: expected 1 or more ranks, got 0"),
    ],
)
def test_what_does_not_divide_is_refused(name, size, match):
    refused(transformer_of(name), size, match)


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline"])
def test_weights_that_are_not_the_models_own_are_refused(name):
    transformer = transformer_of(name)
    transformer.fuse_qkv_projections()
    refused(transformer, 2, "fused projections")

    transformer = transformer_of(name)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    refused(transformer, 2, "adapter")

    transformer = transformer_of(name)
    transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    refused(transformer, 2, "group offloading")

    transformer = transformer_of(name)
    projection = next(module for part, module in transformer.named_modules() if part.endswith("to_q"))
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    refused(transformer, 2, "to_q.weight: expected a plain floating-point parameter, got .* of torch.int8")


def test_ip_adapters_are_refused():
    transformer = transformer_of("FluxPipeline")
    transformer.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(32, 16))
    refused(transformer, 2, "transformer_blocks.0.attn: its processor FluxIPAdapterAttnProcessor has weights")


def test_projections_that_no_plan_knows_are_refused():
    transformer = transformer_of("WanPipeline")
    transformer.blocks[1].attn2.to_k_ip = nn.Linear(24, 24)
    refused(transformer, 2, "blocks.1.attn2.to_k_ip: a linear layer that")
