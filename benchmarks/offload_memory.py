"""What of the embedded model's weights is on the device at once, offloaded or cast, and what the cache holds beside it.

python benchmarks/offload_memory.py

Without an accelerator both devices are the CPU: counted are the bytes that hooks have brought in, at each linear layer.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn
from torch.overrides import TorchFunctionMode

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit.embedded import load_pipeline

CPU = torch.device("cpu")
PROMPT, STEPS = "a red circle left of a blue square", 28
CONFIG = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.2)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that are not on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")


class OnloadedGroups:
    """Counts the bytes of the groups that group offloading has brought in."""

    def __init__(self, model: nn.Module):
        self.total = tensor_bytes(model)
        self.away: dict[int, int] = {}

    def __enter__(self) -> OnloadedGroups:
        self.originals = ModuleGroup.onload_, ModuleGroup.offload_
        onload, offload = self.originals

        def counted_onload(group: Any) -> None:
            self.away.pop(id(group), None)
            onload(group)

        def counted_offload(group: Any) -> None:
            self.away[id(group)] = group_bytes(group)
            offload(group)

        ModuleGroup.onload_, ModuleGroup.offload_ = counted_onload, counted_offload
        return self

    def __exit__(self, *error: object) -> None:
        ModuleGroup.onload_, ModuleGroup.offload_ = self.originals

    def present(self) -> int:
        """Bytes that are in now."""
        return self.total - sum(self.away.values())


class Peak(TorchFunctionMode):
    """The largest value of ``measure`` within linear layers, where their weights have been brought in."""

    def __init__(self, measure: Callable[[], int]):
        super().__init__()
        self.measure, self.value = measure, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.value = max(self.value, self.measure())
        return func(*args, **(kwargs or {}))


def group_bytes(group: Any) -> int:
    """Bytes of the parameters of a group, each once."""
    parameters = {id(p): p for module in group.modules for p in module.parameters()}
    parameters |= {id(p): p for p in group.parameters}
    return sum(p.nbytes for p in parameters.values())


def measure(put: Callable[[nn.Module, str], object], cache: bool) -> tuple[int, int]:
    """The most bytes of weights that were in at a linear layer of a request, and what the cache held after it."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    with tempfile.TemporaryDirectory() as folder, OnloadedGroups(model) as groups:
        put(model, folder)
        if cache:
            cachedit.enable_cache(pipe, CONFIG, TaylorSeerCalibratorConfig())
        with Peak(lambda: groups.present() if groups.away else tensor_bytes(model)) as peak:
            pipe([PROMPT], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        held = sum(branch.bytes_held for e in cachedit.summary(pipe, logging=False) for branch in e.branches.values())
    return peak.value, held


def group(**options: Any) -> Callable[[nn.Module, str], object]:
    """Group offloading to a folder, with these options."""
    return lambda model, folder: apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_to_disk_path=folder, **options
    )


WAYS: dict[str, Callable[[nn.Module, str], object]] = {
    "all on the device": lambda model, folder: None,
    "accelerate, layer by layer": lambda model, folder: cpu_offload(model, CPU),
    "groups of one block": group(offload_type="block_level", num_blocks_per_group=1),
    "groups of four blocks": group(offload_type="block_level", num_blocks_per_group=4),
    "leaf by leaf": group(offload_type="leaf_level"),
    "weights stored in float8": lambda model, folder: model.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    ),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.disable(logging.WARNING)
    print("| | weights, at most | with the cache | held by the cache |\n|---|---|---|---|")
    for name, put in WAYS.items():
        (plain, _), (cached, held) = measure(put, False), measure(put, True)
        print(f"| {name} | {plain / 1e6:.2f} MB | {cached / 1e6:.2f} MB | {held / 1e6:.3f} MB |", flush=True)


if __name__ == "__main__":
    main()
