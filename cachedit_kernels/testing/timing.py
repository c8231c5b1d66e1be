"""Timers for benchmarks: candidates take turns in one process, so that drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU


def paired_medians(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 15, min_seconds: float = 2e-3
) -> dict[str, float]:
    """The median seconds of one call of each candidate, after one warm-up call, over `rounds` rounds of taking turns.

    On CPU a turn repeats a short candidate until it lasts `min_seconds`. On a GPU a turn is one call between two
    events, with the L2 cache flushed before it, and an idle wait in front so that launching is not what is timed.
    """
    timer = cuda_seconds if device.type == "cuda" else cpu_seconds
    repeats = {}
    for name, call in candidates.items():
        call()
        repeats[name] = 1 if device.type == "cuda" else max(1, round(min_seconds / max(cpu_seconds(call), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        for name in list(candidates)[:: 1 if i % 2 == 0 else -1]:
            seconds[name].append(timer(candidates[name], repeats[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def cpu_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call over `repeats` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds that the GPU takes per call, each call with a cold L2 cache."""
    total = 0.0
    for _ in range(repeats):
        _flush_buffer().zero_()
        # The GPU spins for about a millisecond while the host enqueues the call: its Python time stays out.
        torch.cuda._sleep(2_000_000)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        total += start.elapsed_time(stop) / 1e3
    return total / repeats


def copy_bandwidth(device: torch.device, megabytes: int = 512, rounds: int = 9) -> float:
    """Measured bytes per second of a large copy on the device, reads and writes both counted."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)  # zeros may not have pages of their own
    target = torch.ones_like(source)
    seconds = paired_medians({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.numel() / seconds


_flush: dict[int, torch.Tensor] = {}


def _flush_buffer() -> torch.Tensor:
    index = torch.cuda.current_device()
    if index not in _flush:
        _flush[index] = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    return _flush[index]
