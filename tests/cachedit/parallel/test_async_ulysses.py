"""Asynchronous Ulysses: the same result as the synchronous scheme, sent in another order."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

import cachedit
from cachedit import DBCacheConfig, ParallelismConfig
from cachedit.models import find_transformers
from cachedit.parallel import attention
from cachedit.parallel.async_processors import FAMILIES
from cachedit_kernels.ulysses import Exchange
from pipelines import build
from ranks import run_ranks

# What happens in one block, by the names of its linear layers; of a layer that several are fused into, the part.
JOINT = """
    add_v_proj to_v send1  add_q_proj to_q send1  add_k_proj to_k send1
    wait wait wait return1 wait  to_out.0 to_add_out"""
SINGLE = "to_v send1 to_q send1 to_k send1  wait wait wait return1  proj_mlp  wait  proj_out"
ALONE = "to_v send1 to_q send1 to_k send1  wait wait wait return1 wait  to_out.0"
FUSED = "fused[v] send1 fused[q] send1 fused[k] send1  wait wait wait return1  fused[mlp]  wait  to_out"
LOCAL = "to_q to_k to_v to_out.0"
TOGETHER = "to_q to_k to_v add_q_proj add_k_proj add_v_proj  send3 wait  return1 wait  to_out.0 to_add_out"

ORDER = {
    "FluxPipeline": {"transformer_blocks.1": JOINT, "single_transformer_blocks.1": SINGLE},
    "Flux2Pipeline": {"transformer_blocks.1": JOINT, "single_transformer_blocks.1": FUSED},
    "QwenImagePipeline": {"transformer_blocks.1": JOINT},
    "ZImagePipeline": {"layers.1": ALONE},
    "OvisImagePipeline": {"transformer_blocks.1": JOINT, "single_transformer_blocks.1": SINGLE},
    "LongCatImagePipeline": {"transformer_blocks.1": JOINT, "single_transformer_blocks.1": SINGLE},
    "WanPipeline": {"blocks.1": ALONE + " " + LOCAL},
}

CACHE = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.45, max_warmup_steps=2)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def enable(tiny: Any, *cache: Any, **settings: Any) -> None:
    cachedit.enable_cache(tiny.pipe, *cache, parallelism_config=ParallelismConfig(**settings))


def both(tiny: Any, steps: int = 1, size: int = 0, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the synchronous and the asynchronous scheme give."""
    results = []
    for asynchronous in (False, True):
        enable(tiny, ulysses_async=asynchronous, **settings)
        results.append(tiny(steps, size))
        cachedit.disable_cache(tiny.pipe)
    return results[0], results[1]


class Recorder:
    """Events while one block runs for the first time."""

    def __init__(self, block: nn.Module):
        self.events: list[str] = []
        self.names: dict[tuple[int, int], str] = {}  # by a weight's place and its rows
        for name, layer in block.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            if name.endswith("to_qkv_mlp_proj"):
                inner, rows = block.attn.inner_dim, layer.out_features
                for i, part in enumerate(("q", "k", "v", "mlp")):
                    weight = layer.weight[i * inner : rows if part == "mlp" else (i + 1) * inner]
                    self.names[weight.data_ptr(), len(weight)] = f"fused[{part}]"
            elif name.startswith(("att", "proj_")):
                self.names[layer.weight.data_ptr(), layer.out_features] = name.partition(".")[2] or name
        self.state = "before"
        block.register_forward_pre_hook(lambda *_: self.advance("before", "inside"))
        block.register_forward_hook(lambda *_: self.advance("inside", "after"))

    def advance(self, before: str, after: str) -> None:
        self.state = after if self.state == before else self.state

    def note(self, event: str | None) -> None:
        if event is not None and self.state == "inside":
            self.events.append(event)


def events_of(tiny: Any, block: nn.Module) -> list[str]:
    recorder = Recorder(block)
    linear, wait = F.linear, Exchange.wait

    def recorded_linear(x: Any, weight: Any, bias: Any = None) -> Any:
        recorder.note(recorder.names.get((weight.data_ptr(), weight.shape[0])))
        return linear(x, weight, bias)

    def recorded(name: str, begin: Any) -> Any:
        def call(tensors: Any, *args: Any) -> Any:
            recorder.note(f"{name}{len(tensors)}")
            return begin(tensors, *args)

        return call

    def recorded_wait(exchange: Any) -> Any:
        recorder.note("wait")
        return wait(exchange)

    with (
        mock.patch.object(F, "linear", recorded_linear),
        mock.patch.object(Exchange, "wait", recorded_wait),
        mock.patch.object(attention, "begin_scatter_heads", recorded("send", attention.begin_scatter_heads)),
        mock.patch.object(attention, "begin_scatter_sequence", recorded("return", attention.begin_scatter_sequence)),
    ):
        tiny(1, guided=False)
    return recorder.events


def traces(tiny: Any) -> list[Any]:
    """What could be left behind."""
    found: list[Any] = []
    for transformer in find_transformers(tiny.pipe):
        for module in transformer.modules():
            processor = getattr(module, "processor", None)
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            found.append((type(processor), list(vars(processor) if processor else ()), list(vars(module)), hooks))
    return found


def two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, orders in ORDER.items():
        tiny = build(name)
        alone, before = tiny(1), traces(tiny)
        synchronous, asynchronous = both(tiny, ulysses_size=2)
        in_float8, in_float8_async = both(tiny, ulysses_size=2, ulysses_float8=True)
        found[name] = {
            "single": difference(asynchronous, alone),
            "same": difference(asynchronous, synchronous),
            "FP8": difference(in_float8_async, in_float8),
            "rounded": difference(in_float8_async, alone),
            "undone": traces(tiny) == before and torch.equal(tiny(1), alone),
        }
        enable(tiny, ulysses_size=2, ulysses_async=True)
        classes = {trace[0] for trace in before}
        found[name]["classes"] = len(classes), len({trace[0] for trace in traces(tiny)} - classes)
        for block in orders:
            found[name][block] = events_of(tiny, tiny.pipe.transformer.get_submodule(block))
    return found


@pytest.fixture(scope="module")
def on_two_ranks() -> list[Any]:
    return run_ranks(two_ranks, 2)


@pytest.mark.parametrize("name", ORDER)
def test_equal_to_the_synchronous_scheme_and_sent_in_order(on_two_ranks, name):
    for rank in on_two_ranks:
        assert isinstance(rank, dict), rank
        found = rank[name]
        assert found["single"] < 1e-4 and found["same"] < 1e-5, found
        assert found["FP8"] < 1e-5 and found["rounded"] > 1e-4, found
        assert found["undone"]
        classes, new_classes = found["classes"]
        assert 0 < new_classes <= classes, "a class for each block would have each compiled by itself"
        for block, order in ORDER[name].items():
            assert found[block] == order.split(), (block, found[block])


class Changed(FluxAttnProcessor):
    """Somebody's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def special_cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    tiny = build("FluxPipeline")
    decided = []
    for settings in ({"ulysses_async": False}, {"ulysses_async": True}):
        enable(tiny, CACHE, ulysses_size=2, **settings)
        result = tiny(8)
        stats = cachedit.summary(tiny.pipe, logging=False)
        decided.append((result, [(s.cached_steps, s.cfg_cached_steps, s.residual_diffs) for s in stats]))
        cachedit.disable_cache(tiny.pipe)
    (theirs, found["sync decisions"]), (ours, found["async decisions"]) = decided
    found["cached"] = difference(ours, theirs)

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cachedit.parallel.async_ulysses")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    block = tiny.pipe.transformer.transformer_blocks[1]
    block.attn.set_processor(Changed())
    found["changed"] = difference(*both(tiny, ulysses_size=2))
    found["messages"] = list(messages)
    enable(tiny, ulysses_size=2, ulysses_async=True)
    found["order"] = events_of(tiny, block)
    cachedit.disable_cache(tiny.pipe)

    for name in ("FluxPipeline", "WanPipeline"):
        tiny = build(name)
        tiny.pipe.transformer.fuse_qkv_projections()
        found[f"fused {name}"] = difference(*both(tiny, ulysses_size=2))
    tiny = build("QwenImagePipeline")
    unmasked = tiny(1)
    tiny.inputs["prompt_embeds_mask"] = torch.tensor([[1, 1, 1, 1, 0]])
    alone, (synchronous, asynchronous) = tiny(1), both(tiny, ulysses_size=2)
    found["masked"] = difference(asynchronous, synchronous), difference(asynchronous, alone)
    found["effect of the mask"] = difference(alone, unmasked)
    tiny = build("Flux2Pipeline")
    hooked: list[int] = []
    layer = tiny.pipe.transformer.single_transformer_blocks[0].attn.to_qkv_mlp_proj
    layer.register_forward_hook(lambda *_: hooked.append(1))  # now it must be called whole
    found["hooked"] = difference(*both(tiny, ulysses_size=2))
    found["hook calls"] = len(hooked)

    tiny = build("LTXPipeline")
    alone, before = tiny(1), traces(tiny)
    try:
        enable(tiny, ulysses_size=2, ulysses_async=True)
    except ValueError as error:
        found["refused"] = str(error)
    found["nothing changed"] = traces(tiny) == before and torch.equal(tiny(1), alone)
    return found


def test_cache_other_processors_masks_fused_projections_and_refusals():
    for found in run_ranks(special_cases, 2):
        assert isinstance(found, dict), found
        assert found["async decisions"] == found["sync decisions"] and found["cached"] < 1e-5
        assert any(cached or cfg for cached, cfg, _ in found["async decisions"]), "nothing was ever reused"
        assert found["changed"] < 1e-5 and found["order"] == TOGETHER.split(), found["order"]
        assert found["messages"] == ["ulysses_async: Changed sends Q, K and V together"]
        assert found["fused FluxPipeline"] < 1e-5 and found["fused WanPipeline"] < 1e-5
        assert max(found["masked"]) < 1e-5 < found["effect of the mask"], found["masked"]
        assert found["hooked"] < 1e-5 and found["hook calls"] == 2 * 1
        assert "ulysses_async: the attention of LTXVideoTransformer3DModel" in found["refused"]
        assert FAMILIES in found["refused"] and found["nothing changed"]


def four_ranks() -> dict[Any, float]:
    """Two heads and sequences that four ranks can't share out evenly; rings; tensor parallelism last, as it stays."""
    found: dict[Any, float] = {}
    tiny = build("QwenImagePipeline")
    for name in ("prompt_embeds", "prompt_embeds_mask"):
        tiny.inputs[name] = tiny.inputs[name][:, :3]
    found["QwenImagePipeline", "a rank without text"] = difference(*both(tiny, ulysses_size=4))
    for name in ("FluxPipeline", "WanPipeline"):
        tiny = build(name)
        for size in (0, 1):
            found[name, size] = difference(*both(tiny, size=size, ulysses_size=4))
        found[name, "ring"] = difference(*both(tiny, ulysses_size=2, ring_size=2))
        alone = tiny(1)
        enable(tiny, ulysses_size=2, tp_size=2, ulysses_async=True)
        found[name, "tensor"] = difference(tiny(1), alone)
    return found


def test_four_ranks_uneven_rings_and_tensor_parallelism():
    for found in run_ranks(four_ranks, 4):
        assert isinstance(found, dict), found
        for key, error in found.items():
            assert error < (1e-4 if key[1] == "tensor" else 1e-5), (key, error)
