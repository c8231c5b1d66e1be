"""The models whose exchanges are measured and modelled, one forward each, as diffusers 0.42 runs them.

Parameters and FLOPs are counted, not estimated: the transformer of diffusers on the meta device, its forward under
`torch.utils.flop_counter.FlopCounterMode` (a multiply-add is two). tests/benchmarks/test_workloads.py counts them anew.
"""

from __future__ import annotations

from typing import NamedTuple


class Workload(NamedTuple):
    """One forward of a model for one image or video, batch 1."""

    name: str
    transformer: str  # class of diffusers, with its default configuration but for what the comment says
    parameters: int
    layers: int  # with self-attention over the whole sequence
    heads: int
    head_dim: int
    tokens: int  # in that sequence
    linear_flops: float  # of the forward, without attention
    attention_flops: float  # of its matrix products
    row_parallel: int  # linear layers that close a block's attention or MLP: all-reduces under tensor parallelism

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


# FLUX closes attention and MLP apart in 19 blocks and at once in 38; Wan's blocks have a cross-attention besides.
# Text is what the pipelines feed by default: FLUX pads it to 512 tokens, and so does Wan for its cross-attention;
# Qwen-Image and Z-Image take the prompt as long as it is, here 128 tokens. Images are 1024x1024 (64 x 64 tokens), the
# video has 81 frames of 832x480 (21 x 30 x 52 tokens).
WORKLOADS = (
    Workload(
        "FLUX.1", "FluxTransformer2DModel", 11_901_408_320, 57, 24, 128, 4608, 59.512e12, 14.872e12, 76
    ),  # + guidance
    Workload("Qwen-Image", "QwenImageTransformer2DModel", 20_430_401_088, 60, 24, 128, 4224, 57.422e12, 13.155e12, 120),
    Workload("Wan 2.1 14B", "WanTransformer3DModel", 14_288_491_584, 40, 40, 128, 32760, 785.450e12, 892.920e12, 120),
    Workload("Z-Image", "ZImageTransformer2DModel", 6_154_908_736, 30, 30, 128, 4224, 47.842e12, 8.738e12, 60),
)
