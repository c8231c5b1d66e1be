"""Tiny VAEs of diffusers, with tile sizes, latents and pictures that cut them into tiles of several shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


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
MINIMAX = {
    "latent_channels": 4,
    "block_out_channels": (8,) * 6,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 16,
    "decoder_num_register_tokens": 1,
    "decoder_ffn_mult": 1,
    "latents_mean": (0.0,) * 4,
    "latents_std": (1.0,) * 4,
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
    "AutoencoderKLMiniMaxH3": Case(
        "AutoencoderKLMiniMaxH3",
        MINIMAX,
        (1, 4, 7, 7, 4),
        (1, 3, 17, 112, 64),
        {
            "tile_sample_min_height": 64,
            "tile_sample_min_width": 64,
            "tile_sample_min_overlap_height": 16,
            "tile_sample_min_overlap_width": 16,
        },
    ),
    "Mochi, framewise": Case(
        "AutoencoderKLMochi", MOCHI, (1, 12, 4, 3, 2), None, square(16, 8), {"use_framewise_decoding": True}
    ),
    "AutoencoderKLKVAE": Case("AutoencoderKLKVAE", KVAE, (1, 4, 18, 13), (1, 3, 36, 26), SIZE),
    "AutoencoderTiny": Case("AutoencoderTiny", TINY, (1, 4, 9, 6), (1, 3, 72, 48), {"tile_sample_min_size": 32}),
    "AutoencoderOobleck": Case("AutoencoderOobleck", OOBLECK, (1, 4, 50), (1, 2, 200), {}, OOBLECK_TILES),
}


def build(case: Case) -> Any:
    import diffusers

    torch.manual_seed(0)
    vae = getattr(diffusers, case.cls)(**case.config).eval().requires_grad_(False).to(case.dtype)
    for name, value in case.attributes.items():
        setattr(vae, name, value)
    return vae
