"""What docs, examples and configuration files are tried on: small pipelines, and ranks without processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import cachedit
from cachedit.embedded import load_pipeline
from cachedit.embedded.pipeline import EmbeddedPipeline
from pipelines import build
from toys import tiny_flux_pipeline

# Sections that this machine may refuse, each with the only reason that counts.
REFUSED = {
    "quantize_config": r"quant_type 'float8_\w+' needs a GPU of compute capability 8\.9",
    "attention_backend": r"attention_backend 'flash' cannot be used here: .*missing package",
}


class AnyPrompt(EmbeddedPipeline):
    """Takes any prompt and any size, and draws what it can."""

    def __call__(self, prompt: Any = None, height: int | None = None, width: int | None = None, **kwargs: Any) -> Any:
        return super().__call__("a red circle left of a blue square", **kwargs)


def embedded(*_: Any, **__: Any) -> Any:
    """The embedded pipeline, in place of one that would be loaded and moved to a GPU."""
    pipe = load_pipeline()
    pipe.__class__ = AnyPrompt
    pipe.set_progress_bar_config(disable=True)
    pipe.to = lambda *_, **__: pipe
    pipe.enable_model_cpu_offload = partial(pipe.enable_model_cpu_offload, device="cpu")
    return pipe


def flux() -> Any:
    """A FLUX pipeline with all that a configuration file may name: a VAE and two text encoders."""
    from transformers import T5Config, T5EncoderModel

    pipe = tiny_flux_pipeline(double=4, single=8)
    sizes = {"vocab_size": 16, "d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 8}
    encoders = {name: T5EncoderModel(T5Config(**sizes)) for name in ("text_encoder", "text_encoder_2")}
    pipe.register_modules(**encoders)
    return pipe


def wan() -> Any:
    """A Wan 2.2 pipeline: two transformers, with more blocks than DBCache computes by default."""
    pipe = build("WanPipeline + two transformers").pipe
    for transformer in (pipe.transformer, pipe.transformer_2):
        transformer.blocks.extend([*deepcopy(transformer.blocks), *deepcopy(transformer.blocks)])
    return pipe


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """Be rank 0 of so many. Exchanges leave buffers as they are; another `init_process_group` changes nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
            yield
    finally:
        dist.destroy_process_group()


def apply(pipe: Any, configs: dict[str, Any]) -> set[str]:
    """Enable what a file says, and return the sections that were refused for a reason of :data:`REFUSED`."""
    refused: set[str] = set()
    while True:
        try:
            cachedit.enable_cache(pipe, **{name: None if name in refused else value for name, value in configs.items()})
        except ValueError as error:
            found = {name for name, why in REFUSED.items() if re.match(why, str(error))} - refused
            if not found:
                raise
            refused |= found
        else:
            return refused


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
