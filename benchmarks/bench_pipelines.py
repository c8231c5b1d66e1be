"""Denoising loops of whole models with random weights: without a cache, with ours, cache_dit's and diffusers' own.

    python benchmarks/bench_pipelines.py [--models FLUX.1-dev Z-Image] [--caches cachedit] [--tiny] [--csv PATH]

The loop calls the transformer once per step and leaves text encoder, scheduler and VAE out, which no cache changes.
Weights do not change the time, and one mask (the pattern that diffusers' TaylorSeer can keep) decides for everybody;
hooks on the last block check that it does. Every candidate is a copy of one transformer that shares its weights; they
take turns in one process.

cachedit and cache_dit run the first block and forecast with TaylorSeer of order 1. FirstBlockCache has no masks: it
measures each step as ever, and the mask overrules its answer; it reuses the last residual as it is. TaylorSeerCache
skips all blocks, the first one included, and forecasts the last layer's output, so that it can beat the ideal, which
runs the first block and no other in a reused step, and stores nothing. diffusers has neither for Z-Image.
cache_dit gets the transformer by itself and finds its own adapter.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import cachedit
from cachedit.models import find_entry
from cachedit_kernels.testing.timing import paired_medians
from common import DTYPES, append, machine, own_forward
from pipeline_models import MODELS, Inputs, twin

RESULTS = Path(__file__).parent / "results" / "pipelines.csv"
WARMUP, INTERVAL = 3, 3
FIGURES = ("seconds", "speedup", "of_ideal", "peak_mb", "syncs", "kernels")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("aten::_local_scalar_dense", "aten::resolve_neg")  # item() and tolist() of a CPU tensor
Forward = Callable[..., object]
Request = Callable[[], None]


def step_mask(steps: int) -> list[int]:
    """1 where a step is computed: what diffusers' TaylorSeerCache does with WARMUP and INTERVAL."""
    return [int(step < WARMUP or (step - WARMUP - 1) % INTERVAL == 0) for step in range(steps)]


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The block lists by name, in calling order."""
    entry = find_entry(model)
    assert entry is not None
    return {item.name: model.get_submodule(item.name) for group in entry.sections for item in group}


# Each of these puts a cache on a model and returns what starts a request.


def no_cache(model: nn.Module, mask: list[int]) -> Request:
    return lambda: None


def masked(package: Any, model: nn.Module, mask: list[int]) -> Request:
    config = package.DBCacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=WARMUP,
        num_inference_steps=len(mask),
        enable_separate_cfg=False,  # one call per step here, also where the pipeline makes two
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=1)
    package.enable_cache(model, cache_config=config, calibrator_config=calibrator)
    return lambda: package.refresh_context(model, num_inference_steps=len(mask))


def ours(model: nn.Module, mask: list[int]) -> Request:
    return masked(cachedit, model, mask)


def cache_dit(model: nn.Module, mask: list[int]) -> Request:
    import cache_dit

    return masked(cache_dit, model, mask)


def first_block_cache(model: Any, mask: list[int]) -> Request:
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    first = next(iter(block_lists(model).values()))[0]
    hook = first._diffusers_hook.get_hook("fbc_leader_block_hook")
    measure, steps = hook._should_compute_remaining_blocks, iter(())

    @torch.compiler.disable
    def decide(residual: torch.Tensor) -> bool:
        measure(residual)
        return bool(next(steps))

    def begin() -> None:
        nonlocal steps
        model._reset_stateful_cache()
        steps = iter(mask)

    hook._should_compute_remaining_blocks = decide
    return begin


def taylorseer_cache(model: Any, mask: list[int]) -> Request:
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=INTERVAL,
        disable_cache_before_step=WARMUP,
        skip_predict_identifiers=[rf"{name}\.\d+" for name in block_lists(model)],
        cache_identifiers=["proj_out"],
    )
    model.enable_cache(config)
    return model._reset_stateful_cache


CACHES: dict[str, Callable[[nn.Module, list[int]], Request]] = {
    "none": no_cache,
    "ideal": no_cache,
    "cachedit": ours,
    "cache_dit": cache_dit,
    "FirstBlockCache": first_block_cache,
    "TaylorSeerCache": taylorseer_cache,
}
HOOKS = ("FirstBlockCache", "TaylorSeerCache")  # diffusers' own; a transformer without its CacheMixin has none


class Candidate:
    """A cached copy of the model, compiled or not; calling it runs a request and waits for the device."""

    def __init__(self, cache: str, model: nn.Module, inputs: Inputs, mask: list[int], backend: str):
        self.device = next(model.parameters()).device
        self.weights = sum(each.numel() * each.element_size() for each in model.parameters())
        self.before = self._allocated()
        self.inputs, self.mask = inputs, mask
        self.model = own_forward(twin(model))
        self.begin = CACHES[cache](self.model, mask)
        self.full: Forward = self.model
        self.short: Forward | None = None
        if cache == "ideal":
            self.short = own_forward(without_body(model))
        self.computed = self._computed() if cache != "ideal" else mask
        if backend:
            self.full = torch.compile(self.model, backend=backend)
            self.short = self.short and torch.compile(self.short, backend=backend)
        for _ in range(2):  # compiles, and allocates what the cache keeps from request to request
            self()
        self.held = self._allocated() - self.before

    def __call__(self) -> None:
        self.begin()
        context = getattr(self.model, "cache_context", None)
        with torch.no_grad(), context("request") if context else nullcontext():
            for computed in self.mask:
                (self.full if computed or self.short is None else self.short)(**self.inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _computed(self) -> list[int]:
        """Run a request, and say for each step whether the last block was computed."""
        ran: list[int] = []
        last = list(block_lists(self.model).values())[-1][-1]
        layer = next(each for each in last.modules() if isinstance(each, nn.Linear))
        forward = layer.forward

        def note(*args: Any) -> Any:
            ran.append(self.step)
            return forward(*args)

        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.step += 1

        self.step = -1
        layer.forward = note
        handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            self()
        finally:
            handle.remove()
            del layer.forward
        return [int(step in ran) for step in range(len(self.mask))]

    def peak_mb(self) -> str:
        """Weights, and the most that a request and the cache hold besides them, in MB (2**20); "" on CPU."""
        if self.device.type != "cuda":
            return ""
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        request = torch.cuda.max_memory_allocated(self.device) - held
        return f"{(self.weights + self.held + request) / 2**20:.0f}"

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def calls(self) -> tuple[str, str]:
        """Per step: waits for the device and kernels on a GPU, numbers read and torch operators on CPU."""
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
            self()
        events = profiler.events() or []
        if cuda:
            on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
            kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
            syncs = sum(event.name in SYNCS for event in events) - 1  # the last one is the request's own
        else:
            kernels = sum("::" in event.name for event in events)
            syncs = sum(event.name in READS for event in events)
        return f"{syncs / len(self.mask):.2f}", f"{kernels / len(self.mask):.1f}"


def without_body(model: nn.Module) -> nn.Module:
    """A copy whose sections have their first block only."""
    short = twin(model)
    entry = find_entry(model)
    assert entry is not None
    for group in entry.sections:
        for i, item in enumerate(group):
            parent, _, name = item.name.rpartition(".")
            blocks = short.get_submodule(item.name)
            setattr(short.get_submodule(parent), name, nn.ModuleList(blocks[:1] if i == 0 else []))
    return short


def measure(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row per candidate of a model."""
    device, mask = torch.device(arguments.device), step_mask(arguments.steps)
    model, inputs = MODELS[name].build(arguments.tiny, device, DTYPES[arguments.dtype])
    candidates: dict[tuple[str, bool], Candidate] = {}
    caches = [cache for cache in arguments.caches if cache not in HOOKS or hasattr(model, "enable_cache")]
    for compiled in (False,) if arguments.no_compile else (False, True):
        for cache in caches:
            backend = arguments.backend if compiled else ""
            candidate = Candidate(cache, model, inputs, mask, backend)
            expected = [1] * len(mask) if cache == "none" else mask
            if candidate.computed != expected:
                raise RuntimeError(f"{name}, {cache}: the mask is {expected}, what ran is {candidate.computed}")
            candidates[cache, compiled] = candidate
    figures = {key: (candidate.peak_mb(), *candidate.calls()) for key, candidate in candidates.items()}
    cpu = torch.device("cpu")  # the host's clock: a request waits for the device itself
    medians = paired_medians({str(key): run for key, run in candidates.items()}, cpu, arguments.rounds)
    for (cache, compiled), rest in figures.items():
        seconds, neither = medians[str((cache, compiled))], medians[str(("none", False))]
        ideal = medians[str(("ideal", compiled))]
        ratios = f"{neither / seconds:.2f}", "" if cache == "none" else f"{ideal / seconds:.3f}"
        row = {
            "model": name,
            "tiny": arguments.tiny,
            "steps": len(mask),
            "computed": sum(candidates[cache, compiled].computed),
        }
        row |= {"dtype": arguments.dtype, "cache": cache, "compiled": compiled}
        yield row | dict(zip(FIGURES, (f"{seconds:.4f}", *ratios, *rest), strict=True))


@contextmanager
def quiet() -> Iterator[None]:
    """cache_dit reports at length, and dynamo's limit on recompilations is not what is measured."""
    logging.disable(logging.WARNING)
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--caches", nargs="+", choices=list(CACHES)[2:], default=list(CACHES)[2:], metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a few small blocks instead of the published sizes")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5, help="turns that each candidate takes; medians are reported")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="history to add to (default: %(default)s)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("cache_dit") is None:
        arguments.caches = [cache for cache in arguments.caches if cache != "cache_dit"]
    arguments.caches = ["none", "ideal", *arguments.caches]  # what the others are compared with
    common = machine(torch.device(arguments.device)) | {"diffusers": diffusers.__version__}
    printed = ("model", "cache", "compiled", "computed", *FIGURES)
    print("".join(f"{column:>16}" for column in printed))
    with quiet():
        for name in arguments.models:
            torch.compiler.reset()
            for row in measure(name, arguments):
                print("".join(f"{row[column]!s:>16}" for column in printed), flush=True)
                append(arguments.csv, common | row)


if __name__ == "__main__":
    main()
