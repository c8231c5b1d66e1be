"""Shared tiles against diffusers' own tiled encode and decode, bit by bit, on 2 and 4 ranks."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cachedit.parallel.vae import SUPPORTED, Call, _balance, share_tiles
from ranks import run_ranks


class Case(NamedTuple):
    cls: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    picture: tuple[int, ...] | None  # None: diffusers' own tiled encode doesn't work
    sizes: dict[str, Any]  # given to share_tiles
    attributes: dict[str, Any] = {}  # noqa: RUF012  (set on the VAE beforehand)
    dtype: torch.dtype = torch.float32


def square(size: int, stride: int, **frames: int) -> dict[str, int]:
    sides = "height", "width"
    return (
        {f"tile_sample_min_{side}": size for side in sides}
        | {f"tile_sample_stride_{side}": stride for side in sides}
        | frames
    )


KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 4),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "latent_channels": 4,
}
WAN = {"base_dim": 3, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
WAN_5B = WAN | {
    "decoder_base_dim": 3,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "scale_factor_spatial": 16,
}
QWEN = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
QWEN_21 = QWEN | {"decoder_base_dim": 8, "in_channels": 3, "out_channels": 3}
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "patch_size": 1,
    "patch_size_t": 1,
}
LTX_2 = {
    "latent_channels": 4,
    "block_out_channels": (8,),
    "decoder_block_out_channels": (8,),
    "layers_per_block": (1,),
    "decoder_layers_per_block": (1, 1),
    "spatio_temporal_scaling": (True,),
    "decoder_spatio_temporal_scaling": (True,),
    "decoder_inject_noise": (False, False),
    "downsample_type": ("spatial",),
    "upsample_residual": (False,),
    "upsample_factor": (1,),
}
HUNYUAN = {
    "latent_channels": 4,
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    "block_out_channels": (8,) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
HUNYUAN_15 = {
    "latent_channels": 4,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
    "downsample_match_channel": False,
    "upsample_match_channel": False,
}
HUNYUAN_IMAGE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 2,
    "sample_size": 16,
}
COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8,) * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
ALLEGRO = COGVIDEOX | {
    "down_block_types": ("AllegroDownBlock3D",) * 4,
    "up_block_types": ("AllegroUpBlock3D",) * 4,
}
DC = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}
MOCHI = {
    "latent_channels": 12,
    "encoder_block_out_channels": (32,) * 4,
    "decoder_block_out_channels": (32,) * 4,
    "layers_per_block": (1,) * 5,
}
TINY = {
    "encoder_block_out_channels": (4,) * 4,
    "decoder_block_out_channels": (4,) * 4,
    "num_encoder_blocks": (1,) * 4,
    "num_decoder_blocks": (1,) * 4,
}
OOBLECK = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [2, 2],
    "channel_multiples": [1, 2],
    "decoder_channels": 4,
    "decoder_input_channels": 4,
}
KVAE = {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1), "sample_size": 32}
FRAMES = {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4}
FRAMEWISE = {"use_framewise_encoding": True, "use_framewise_decoding": True}
ALLEGRO_TILES = {
    "kernel": (8, 32, 32),
    "stride": (4, 24, 24),
    "tile_overlap_t": 4,
    "tile_overlap_h": 8,
    "tile_overlap_w": 8,
}
OOBLECK_TILES = {
    "tile_sample_min_length": 64,
    "tile_sample_overlap": 8,
    "tile_latent_min_length": 16,
    "tile_latent_overlap": 4,
}
SIZE = {"tile_sample_min_size": 16}

# Tiles of several shapes each, down to slivers.
CASES = {
    "AutoencoderKL": Case("AutoencoderKL", KL, (1, 4, 18, 13), (1, 3, 36, 26), SIZE),
    "slices": Case("AutoencoderKL", KL, (2, 4, 10, 6), (2, 3, 20, 12), SIZE, {"use_slicing": True}),
    "bfloat16": Case("AutoencoderKL", KL, (2, 4, 10, 6), (2, 3, 20, 12), SIZE, dtype=torch.bfloat16),
    "two tiles": Case("AutoencoderKL", KL, (1, 4, 10, 6), (1, 3, 20, 12), SIZE),
    "one tile": Case("AutoencoderKL", KL, (1, 4, 8, 6), (1, 3, 16, 12), SIZE),
    "own sizes": Case("AutoencoderKL", KL | {"sample_size": 16}, (1, 4, 10, 6), (1, 3, 20, 12), {}),
    "AutoencoderKLFlux2": Case("AutoencoderKLFlux2", KL, (1, 4, 18, 13), (1, 3, 36, 26), SIZE),
    "AutoencoderKLWan": Case("AutoencoderKLWan", WAN, (1, 4, 3, 5, 4), (1, 3, 9, 40, 32), square(32, 24)),
    "Wan, one tile": Case("AutoencoderKLWan", WAN, (1, 4, 2, 4, 3), (1, 3, 5, 32, 24), square(32, 24)),
    "Wan, slices": Case(
        "AutoencoderKLWan", WAN, (2, 4, 2, 5, 3), (2, 3, 5, 40, 24), square(32, 24), {"use_slicing": True}
    ),
    "Wan 2.2 5B": Case("AutoencoderKLWan", WAN_5B, (1, 4, 2, 5, 3), (1, 3, 5, 144, 48), square(64, 48)),
    "AutoencoderKLQwenImage": Case("AutoencoderKLQwenImage", QWEN, (1, 4, 1, 5, 3), (1, 3, 1, 20, 12), square(16, 12)),
    "AutoencoderKLQwenImage21": Case(
        "AutoencoderKLQwenImage21", QWEN_21, (1, 4, 1, 5, 3), (1, 3, 1, 80, 48), square(64, 48)
    ),
    "AutoencoderKLLTXVideo": Case(
        "AutoencoderKLLTXVideo", LTX, (1, 8, 3, 6, 3), (1, 3, 9, 24, 12), square(16, 12, **FRAMES), FRAMEWISE
    ),
    "AutoencoderKLLTX2Video": Case(
        "AutoencoderKLLTX2Video",
        LTX_2,
        (1, 4, 3, 5, 3),
        (1, 3, 5, 40, 24),
        square(32, 24, tile_sample_min_num_frames=4, tile_sample_stride_num_frames=2),
        FRAMEWISE,
    ),
    "AutoencoderKLHunyuanVideo": Case(
        "AutoencoderKLHunyuanVideo", HUNYUAN, (1, 4, 3, 5, 3), (1, 3, 9, 40, 24), square(32, 24, **FRAMES)
    ),
    "Hunyuan, tiles in time only": Case(
        "AutoencoderKLHunyuanVideo", HUNYUAN, (1, 4, 3, 3, 2), (1, 3, 9, 24, 16), square(32, 24, **FRAMES)
    ),
    "AutoencoderKLHunyuanVideo15": Case(
        "AutoencoderKLHunyuanVideo15",
        HUNYUAN_15,
        (1, 4, 2, 5, 3),
        (1, 3, 3, 20, 12),
        {
            "tile_sample_min_height": 16,
            "tile_sample_min_width": 16,
            "tile_latent_min_height": 4,
            "tile_latent_min_width": 4,
        },
    ),
    "AutoencoderKLHunyuanImage": Case("AutoencoderKLHunyuanImage", HUNYUAN_IMAGE, (1, 4, 18, 13), None, SIZE),
    "AutoencoderKLCogVideoX": Case(
        "AutoencoderKLCogVideoX",
        COGVIDEOX,
        (1, 4, 5, 6, 3),
        (1, 3, 9, 48, 24),
        {"tile_sample_min_height": 32, "tile_sample_min_width": 32},
    ),
    "AutoencoderKLAllegro": Case(
        "AutoencoderKLAllegro", ALLEGRO, (1, 4, 3, 7, 7), (1, 3, 12, 56, 56), {}, ALLEGRO_TILES
    ),
    "AutoencoderDC": Case("AutoencoderDC", DC, (1, 4, 18, 13), (1, 3, 36, 26), square(16, 12)),
    "AutoencoderKLMochi": Case("AutoencoderKLMochi", MOCHI, (1, 12, 2, 4, 3), (1, 3, 7, 32, 24), square(16, 8)),
    "Mochi, framewise": Case(
        "AutoencoderKLMochi", MOCHI, (1, 12, 4, 3, 2), None, square(16, 8), {"use_framewise_decoding": True}
    ),
    "AutoencoderKLKVAE": Case("AutoencoderKLKVAE", KVAE, (1, 4, 18, 13), (1, 3, 36, 26), SIZE),
    "AutoencoderTiny": Case("AutoencoderTiny", TINY, (1, 4, 9, 6), (1, 3, 72, 48), {"tile_sample_min_size": 32}),
    "AutoencoderOobleck": Case("AutoencoderOobleck", OOBLECK, (1, 4, 50), (1, 2, 200), {}, OOBLECK_TILES),
}

IN_FOURS = ("AutoencoderKL", "two tiles", "one tile", "slices", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo")


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


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


def build(case: Case) -> Any:
    import diffusers

    torch.manual_seed(0)
    vae = getattr(diffusers, case.cls)(**case.config).eval().requires_grad_(False).to(case.dtype)
    for name, value in case.attributes.items():
        setattr(vae, name, value)
    return vae


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
        with Collectives() as collectives, Computed(coder) as computed:
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
    share_tiles(vae, group, **SIZE)
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
        facts["failure"] = fail(impatient)
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


def test_balance() -> None:
    def calls(*costs: int) -> list[Call]:
        like = torch.Size(), (), torch.float32, torch.device("cpu")
        return [Call(tile, cost, *like, False) for tile, cost in enumerate(costs)]

    assert _balance(calls(8, 2, 6, 1), 2) == [0, 1, 1, 0]
    assert _balance(calls(1, 1), 4) == [0, 1]
    two = [call._replace(tile=call.tile // 2) for call in calls(1, 1, 1, 1, 1, 1)]
    assert _balance(two, 2) == [0, 0, 1, 1, 0, 0]  # a tile's calls stay together
