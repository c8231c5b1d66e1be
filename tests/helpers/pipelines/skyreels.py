"""SkyReels V2."""

from __future__ import annotations

from typing import Any

from pipelines.common import Tiny, builds, clip, photo
from pipelines.wan import IMAGE_DIMS, unipc, wan, wan_transformer


def skyreels(name: str, in_channels: int = 16, **inputs: Any) -> Tiny:
    transformer = wan_transformer(
        "SkyReelsV2Transformer3DModel", in_channels, **(IMAGE_DIMS if in_channels > 16 else {})
    )
    return wan(name, transformer, unipc(flow_shift=8.0), **inputs)


@builds("SkyReelsV2Pipeline")
def _() -> Tiny:
    return skyreels("SkyReelsV2Pipeline")


@builds("SkyReelsV2ImageToVideoPipeline")
def _() -> Tiny:
    return skyreels("SkyReelsV2ImageToVideoPipeline", 36, image=photo)


@builds("SkyReelsV2DiffusionForcingPipeline")
def _() -> Tiny:
    return skyreels("SkyReelsV2DiffusionForcingPipeline", prompt=None, base_num_frames=9)


@builds("SkyReelsV2DiffusionForcingImageToVideoPipeline")
def _() -> Tiny:
    return skyreels("SkyReelsV2DiffusionForcingImageToVideoPipeline", image=photo, base_num_frames=9)


@builds("SkyReelsV2DiffusionForcingVideoToVideoPipeline")
def _() -> Tiny:
    tiny = skyreels("SkyReelsV2DiffusionForcingVideoToVideoPipeline", base_num_frames=9, overlap_history=1)
    tiny.inputs["video"] = clip
    return tiny
