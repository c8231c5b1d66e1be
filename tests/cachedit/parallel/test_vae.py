"""Shared tiles against diffusers' own tiled encode and decode, bit by bit, on 2 and 4 ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cachedit.parallel.vae import SUPPORTED, Call, SharedMethod, _balance, share_tiles
from counts import COLLECTIVES, Operators
from ranks import run_ranks
from vaes import CASES, LTX_2, Case, build

IN_FOURS = ("AutoencoderKL", "two tiles", "one tile", "slices", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo")


class Computed:
    """Counts what the encoder or decoder computes: calls of its first layer, but for the plan's."""

    def __init__(self, coder: nn.Module):
        self.count = 0
        leaf = next(module for module in coder.modules() if not list(module.children()))
        self.hook = leaf.register_forward_pre_hook(self.see)

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.count += not args[0].is_meta

    def __enter__(self) -> Computed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()


def run(vae: Any, method: str, x: Tensor) -> Tensor:
    (result,) = getattr(vae, method)(x, return_dict=False)
    return getattr(result, "parameters", result)


def expect(case: Case) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Per method, the input, what one process makes of it, and how many calls that takes."""
    vae = build(case)
    if type(vae).enable_tiling.__code__.co_argcount > 1:
        vae.enable_tiling(**case.sizes)
    else:
        vae.enable_tiling()
        for name, value in case.sizes.items():
            setattr(vae, name, value)
            vae.tile_latent_min_size = value * case.latent[-1] // case.picture[-1]
    expected = {}
    for method, shape in (("decode", case.latent), ("encode", case.picture)):
        if shape is not None:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
            with Computed(vae.encoder if method == "encode" else vae.decoder) as computed:
                expected[method] = x, run(vae, method, x), computed.count
    return expected


def share(case: Case, expected: dict[str, tuple[Tensor, Tensor, int]], group: Any) -> dict[str, Any]:
    """Per method: the result is equal, calls that this rank computed, calls in one process, collectives."""
    vae = build(case)
    for method, (x, _, _) in expected.items():
        if case.cls != "AutoencoderKLAllegro":  # which can do nothing without tiles
            run(vae, method, x)  # so that what VAEs note when they run is there before
    before = dict(vars(vae))
    handle = share_tiles(vae, group, **case.sizes)
    facts: dict[str, Any] = {"slicing kept": vae.use_slicing == case.attributes.get("use_slicing", False)}
    for method, (x, result, calls) in expected.items():
        coder = vae.encoder if method == "encode" else vae.decoder
        first = run(vae, method, x)
        with Operators(*COLLECTIVES) as collectives, Computed(coder) as computed:
            second = run(vae, method, x)  # by the plan that was kept
        same = torch.equal(first, result) and torch.equal(second, result)
        same &= (second.dtype, second.device) == (result.dtype, result.device)
        facts[method] = same, computed.count, calls, dict(collectives.counts)
        facts[f"{method}: decoder as before"] = "forward" not in vars(coder)
    handle.undo()
    facts["undone"] = vars(vae) == before
    handle.undo()
    return facts


def fail(group: Any) -> tuple[float, str]:
    """One rank's decoder fails: seconds until this rank fails, and how."""
    vae = build(CASES["AutoencoderKL"])
    share_tiles(vae, group, **CASES["AutoencoderKL"].sizes)
    vae.decode(torch.randn(1, 4, 18, 13))
    if dist.get_rank(group) == 1:
        vae.decoder.conv_in.register_forward_pre_hook(lambda *args: 1 / 0)
    start = time.monotonic()
    try:
        vae.decode(torch.randn(1, 4, 18, 13))
    except Exception as error:
        assert "forward" not in vars(vae.decoder)
        return time.monotonic() - start, type(error).__name__
    return 0.0, "none"


def offload(group: Any) -> dict[str, bool]:
    """With the hook of ``enable_model_cpu_offload``, which must not meet the plan's weights."""
    case = CASES["two tiles"]
    x, result, _ = expect(case)["decode"]
    vae = build(case)
    met: list[bool] = []
    vae._hf_hook = hook = SimpleNamespace(
        pre_forward=lambda vae: met.extend(weight.is_meta for weight in vae.parameters())
    )
    share_tiles(vae, group, **case.sizes)
    equal = torch.equal(run(vae, "decode", x), result)
    return {"equal": equal, "called": bool(met), "weights are real": not any(met), "stays": vae._hf_hook is hook}


def refuse_outsiders(group: Any) -> str:
    try:
        share_tiles(build(CASES["AutoencoderKL"]), group)
    except ValueError as error:
        return str(error)
    return "nothing"


def go_over_all() -> dict[str, Any]:
    """The first pair of ranks takes every other case, the second the rest, all four together some."""
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    impatient = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    pair = dist.get_rank() // 2
    facts: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        if number % 2 == pair:
            facts[name, 2] = share(case, expect(case), pairs[pair])
    for name in IN_FOURS:
        facts[name, 4] = share(CASES[name], expect(CASES[name]), None)
    if pair == 0:
        facts["offload"] = offload(pairs[0])
        facts["failure"] = fail(impatient)
    else:
        facts["outsiders"] = refuse_outsiders(pairs[0])
    return facts


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    pytest.importorskip("diffusers")
    ranks = run_ranks(go_over_all, 4)
    assert all(isinstance(result, dict) for result in ranks), ranks
    return ranks


@pytest.mark.parametrize("name, world", [(name, 2) for name in CASES] + [(name, 4) for name in IN_FOURS])
def test_equals_one_process(facts: list[dict[str, Any]], name: str, world: int) -> None:
    mine = [fact[name, world] for fact in facts if (name, world) in fact]
    assert len(mine) == world
    for method in ("decode", "encode"):
        if method not in mine[0]:
            assert method == "encode" and CASES[name].picture is None
            continue
        same, computed, calls, collectives = zip(*(fact.pop(method) for fact in mine))
        assert all(same)
        if "one tile" in name:
            assert computed == calls
            assert all(not counts for counts in collectives)
        else:
            assert sum(computed) == calls[0]  # each tile is computed once
            assert max(computed) < calls[0]
            assert all(counts == {"c10d::_allgather_base_": 1} for counts in collectives)
    assert all(all(fact.values()) for fact in mine), mine


def test_all_supported_classes_are_proved() -> None:
    assert {case.cls for case in CASES.values()} == set(SUPPORTED)


def test_a_failing_rank_fails_the_others(facts: list[dict[str, Any]]) -> None:
    (waited, waiting), (_, failing) = (facts[rank]["failure"] for rank in (0, 1))
    assert failing == "ZeroDivisionError"
    assert waiting in ("RuntimeError", "DistBackendError")
    assert waited < 20


def test_model_offload(facts: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert all(facts[rank]["offload"].values()), facts[rank]["offload"]


def test_outsiders_are_refused(facts: list[dict[str, Any]]) -> None:
    assert facts[2]["outsiders"] == facts[3]["outsiders"] == "group must contain this rank"


@pytest.fixture
def alone() -> Iterator[None]:
    pytest.importorskip("diffusers")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_only_tiles(alone: None) -> None:
    vae = build(CASES["AutoencoderKL"])
    before = dict(vars(vae))
    handle = share_tiles(vae, tile_sample_min_size=16)
    assert set(vars(vae)) == set(before)
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (True, 16, 8)
    handle.undo()
    assert vars(vae) == before


def kl() -> Any:
    return build(CASES["AutoencoderKL"])


def hooked() -> Any:
    vae = kl()
    vae.decoder.conv_in._hf_hook = object()
    return vae


def noisy() -> Any:
    case = CASES["AutoencoderKLLTX2Video"]
    return build(case._replace(config=LTX_2 | {"decoder_inject_noise": (True, False)}))


def shared() -> Any:
    vae = kl()
    vae.decode = SharedMethod(vae, vae.decode, "decoder", None)
    return vae


@pytest.mark.parametrize(
    "make, sizes, message",
    [
        (lambda: nn.Conv2d(1, 1, 1), {}, "vae must be one of AutoencoderDC, .*, got Conv2d"),
        (kl, {"tile_size": 8}, "AutoencoderKL has the tile sizes .*tile_overlap_factor, got tile_size"),
        (noisy, {}, "AutoencoderKLLTX2Video's decoder draws noise"),
        (hooked, {}, "hooks inside of Decoder"),
        (shared, {}, "tiles of this AutoencoderKL are shared already"),
    ],
)
def test_refusals_change_nothing(alone: None, make: Any, sizes: dict[str, int], message: str) -> None:
    vae = make()
    before = dict(vars(vae))
    with pytest.raises(ValueError, match=message):
        share_tiles(vae, None, **sizes)
    assert vars(vae) == before


def test_hooks_and_autocast_are_noticed_later_too() -> None:
    pytest.importorskip("diffusers")
    vae = shared()
    with pytest.raises(RuntimeError, match="can't be shared under autocast"), torch.autocast("cpu"):
        vae.decode(torch.zeros(1, 4, 8, 8))
    vae.decoder.conv_in._hf_hook = object()
    with pytest.raises(ValueError, match="hooks inside of Decoder"):
        vae.decode(torch.zeros(1, 4, 8, 8))


def test_balance() -> None:
    def calls(*costs: int) -> list[Call]:
        like = torch.Size(), (), torch.float32, torch.device("cpu")
        return [Call(tile, cost, *like, False) for tile, cost in enumerate(costs)]

    assert _balance(calls(8, 2, 6, 1), 2) == [0, 1, 1, 0]
    assert _balance(calls(1, 1), 4) == [0, 1]
    two = [call._replace(tile=call.tile // 2) for call in calls(1, 1, 1, 1, 1, 1)]
    assert _balance(two, 2) == [0, 0, 1, 1, 0, 0]  # a tile's calls stay together
