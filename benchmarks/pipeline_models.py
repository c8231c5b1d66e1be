"""What ``bench_pipelines.py`` runs: transformers of diffusers with random weights, and the inputs of one forward.

Sizes are those of the published models, at what their pipelines draw by default: 1024x1024 pictures, and for Wan 81
frames of 832x480. Text has the length that the pipeline pads it to, else 128 tokens. Batch 1; where a pipeline calls
its transformer twice in a step, for guidance, one of the two calls is what is run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

Inputs = dict[str, Any]


class PipelineModel(NamedTuple):
    """A transformer and how it is called.

    ``config`` is the published model's where it departs from the class's defaults, ``tiny`` the small one's. ``inputs``
    makes the arguments of a forward from the model, ``size`` (latent tokens per axis; ``tiny_size``) and text tokens.
    """

    transformer: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    size: tuple[int, ...]
    tiny_size: tuple[int, ...]
    text: int
    inputs: Callable[[nn.Module, tuple[int, ...], int], Inputs]

    def build(self, tiny: bool, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
        """The transformer, made on the device in a dtype, and the inputs of a forward; buffers may be wider."""
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(diffusers, self.transformer)(**(self.tiny if tiny else self.config)).eval()
                inputs = self.inputs(model, self.tiny_size if tiny else self.size, 8 if tiny else self.text)
        finally:
            torch.set_default_dtype(default)
        return model, inputs


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, of a class of its own: caches patch one and leave the other alone."""
    tensors = [*model.parameters(), *model.buffers()]
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    shared.__class__ = type(type(model).__name__, (type(model),), {})
    return shared


def flux(model: nn.Module, size: tuple[int, ...], text: int) -> Inputs:
    height, width = size
    config = model.config
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
    inputs = {
        "hidden_states": torch.randn(1, height * width, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": grid.to(torch.get_default_dtype()),
        "txt_ids": torch.zeros(text, 3),
    }
    return inputs | ({"guidance": torch.tensor([3.5])} if config.guidance_embeds else {})


def qwen(model: nn.Module, size: tuple[int, ...], text: int) -> Inputs:
    height, width = size
    return {
        "hidden_states": torch.randn(1, height * width, model.config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, model.config.joint_attention_dim),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, height, width)]],
    }


def wan(model: nn.Module, size: tuple[int, ...], text: int) -> Inputs:
    frames, height, width = size
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, model.config.text_dim),
    }


def z_image(model: nn.Module, size: tuple[int, ...], text: int) -> Inputs:
    height, width = size
    return {
        "x": [torch.randn(model.config.in_channels, 1, 2 * height, 2 * width)],
        "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(text, model.config.cap_feat_dim)],
    }


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MODELS = {
    "FLUX.1-dev": PipelineModel(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {
            **HEADS,
            **{"in_channels": 8, "num_layers": 4, "num_single_layers": 8, "joint_attention_dim": 16},
            **{"pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
        },
        (64, 64),
        (8, 8),
        512,
        flux,
    ),
    "Qwen-Image": PipelineModel(
        "QwenImageTransformer2DModel",
        {},
        {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 8, "joint_attention_dim": 16}
        | {"axes_dims_rope": (4, 6, 6)},
        (64, 64),
        (8, 8),
        128,
        qwen,
    ),
    "Wan 2.1 1.3B": PipelineModel(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32}
        | {"num_layers": 8, "rope_max_seq_len": 32},
        (21, 30, 52),
        (2, 4, 8),
        512,
        wan,
    ),
    "Z-Image": PipelineModel(
        "ZImageTransformer2DModel",
        {},
        {"dim": 32, "n_layers": 8, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
        | {"axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32]},
        (64, 64),
        (8, 8),
        128,
        z_image,
    ),
}
