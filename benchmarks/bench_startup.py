"""The first cached call in a fresh process: what importing, enabling and the first steps take.

    python benchmarks/bench_startup.py [--device cuda] [--processes 5] [--csv PATH]

Each row is the median over processes of its own, taken in turns: ours with every implementation of the operators that
serves the device, and cache_dit. torch and, where it is installed, diffusers are imported before the clock starts; in
"cachedit, torch alone" diffusers is not, and enabling imports dynamo, which diffusers would have. "first" is the first
forward, which computes; "second" is the first reused one. Triton compiles its kernels in a new process unless its disk
cache has them: "triton, empty cache" is a fresh machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import append, device_name

RESULTS = Path(__file__).parent / "results" / "startup.csv"
PARTS = ("import", "enable", "first", "second")
# Run with the device as its argument; the class is bench_engine's in shape, small, and knows neither engine.
SCRIPT = """
import contextlib, io, json, logging, sys, time
import torch
from torch import nn
{before}
class Block(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states, hidden_states + 1.0
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(57))
    def forward(self, hidden_states, encoder_hidden_states):
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return hidden_states
device = sys.argv[1]
model, streams = Model(), (torch.ones(1, 256, 64, device=device), torch.ones(1, 64, 64, device=device))
def clock():
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter())
times = []
with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
    clock()
    import {engine} as engine
    clock()
    logging.disable()
    adapter = engine.BlockAdapter(
        transformer=model, blocks=model.transformer_blocks, forward_pattern=engine.ForwardPattern.Pattern_1{adapter}
    )
    engine.enable_cache(
        adapter,
        cache_config=engine.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=0, residual_diff_threshold=1.0, num_inference_steps=8
        ),
        calibrator_config=engine.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    clock()
    model(*streams)
    clock()
    model(*streams)
    clock()
print(json.dumps([1e3 * (b - a) for a, b in zip(times, times[1:])]))
"""


def candidates(device: str) -> dict[tuple[str, str], tuple[str, dict[str, str]]]:
    """By engine and operators: the script, and its environment."""
    diffusers = importlib.util.find_spec("diffusers") is not None
    before = "import diffusers" if diffusers else ""
    ours = SCRIPT.format(engine="cachedit", before=before, adapter="")
    implementations = ("cuda", "triton") if device == "cuda" else ("cpp",)
    found = {("cachedit", name): (ours, {"CACHEDIT_KERNELS_BACKEND": name}) for name in (*implementations, "reference")}
    if device == "cuda":
        found["cachedit", "triton, empty cache"] = ours, {"CACHEDIT_KERNELS_BACKEND": "triton", "TRITON_CACHE_DIR": ""}
    if diffusers:
        found["cachedit, torch alone", implementations[0]] = SCRIPT.format(engine="cachedit", before="", adapter=""), {}
    if importlib.util.find_spec("cache_dit") is not None:
        theirs = SCRIPT.format(engine="cache_dit", before=before, adapter=", check_forward_pattern=False")
        found["cache_dit", "its own"] = theirs, {}
    return found


def run(script: str, device: str, environment: dict[str, str]) -> list[float]:
    """Milliseconds per part, of one process."""
    with tempfile.TemporaryDirectory() as empty:
        if environment.get("TRITON_CACHE_DIR") == "":
            environment = environment | {"TRITON_CACHE_DIR": empty}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, device],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=5, help="per row; medians are reported")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="history to add to (default: %(default)s)")
    arguments = parser.parse_args()

    times: dict[tuple[str, str], list[list[float]]] = {key: [] for key in candidates(arguments.device)}
    for _ in range(arguments.processes):
        for key, (script, environment) in candidates(arguments.device).items():
            times[key].append(run(script, arguments.device, environment))
    print(f"{'engine':>21} {'operators':>20}" + "".join(f"{part + ', ms':>12}" for part in (*PARTS, "total")))
    for (engine, operators), measured in times.items():
        figures = [statistics.median(part) for part in zip(*measured, strict=True)]
        figures.append(statistics.median(map(sum, measured)))
        row = {"engine": engine, "operators": operators, "torch": torch.__version__}
        row |= {"date": datetime.date.today().isoformat(), "device": device_name(torch.device(arguments.device))}
        row |= {f"{part}_ms": f"{ms:.1f}" for part, ms in zip((*PARTS, "total"), figures, strict=True)}
        append(arguments.csv, row)
        print(f"{engine:>21} {operators:>20}" + "".join(f"{ms:>12.1f}" for ms in figures))


if __name__ == "__main__":
    main()
