"""Host time and operator calls of the cache itself, around 57 blocks that do nothing.

    python benchmarks/bench_engine.py [--device cuda] [--rounds 200] [--csv PATH]

Rows: a step that is computed, one that is measured and reused, one that a static mask reuses; ours and, if it is
installed, cache_dit on the same model, in turns in one process. "above loop" is the time above a bare loop over the
blocks that the step runs: all 57 for a computed step, the first one for a reused step. It is the host's clock on a GPU,
too: there the device has hardly anything to do, and only a step that is measured waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
from cachedit_kernels.testing.timing import paired_medians
from common import device_name

RESULTS = Path(__file__).parent / "results" / "engine.csv"
COLUMNS = ("date", "device", "torch", "engine", "step", "microseconds", "above_loop_us", "operators")
FOREVER = 10**9
STEPS = {
    "computed": {"max_continuous_cached_steps": 0},
    "reused": {"residual_diff_threshold": 1.0},
    "reused, static mask": {
        "steps_computation_mask": [1] + [0] * 10**6,
        "steps_computation_policy": "static",
    },
}


class EmptyBlock(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states, hidden_states


class Loop(nn.Module):
    """FLUX's shape: 19 double and 38 single blocks."""

    def __init__(self, duals: int = 19, singles: int = 38):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(EmptyBlock() for _ in range(duals))
        self.single_transformer_blocks = nn.ModuleList(EmptyBlock() for _ in range(singles))

    def forward(self, hidden_states, encoder_hidden_states):
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states
            )
        for block in self.single_transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states
            )
        return hidden_states, encoder_hidden_states


def ours(settings: dict[str, object]) -> nn.Module:
    model = Loop()
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=ForwardPattern.Pattern_1,
        linked=True,
    )
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=0, **settings)
    cachedit.enable_cache(adapter, config, TaylorSeerCalibratorConfig(taylorseer_order=1))
    return model


def peer(settings: dict[str, object]) -> nn.Module | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import cache_dit
    except ImportError:
        return None
    logging.disable(logging.WARNING)
    # Its lists decide one by one, so it gets all 57 blocks in one.
    model = Loop(duals=57, singles=0)
    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=model,
            blocks=model.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_1,
            check_forward_pattern=False,
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=0, num_inference_steps=FOREVER, **settings
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    return model


def operators(step: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    # tolist() calls two operators that do nothing on their way to read the sums.
    nothing = ("aten::resolve_conj", "aten::resolve_neg")
    return sum("::" in event.name and event.name not in nothing for event in profiler.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where the tensors are (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="turns that each candidate takes; medians are reported")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="history to add to (default: %(default)s)")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    streams = torch.randn(1, 16, 8, device=device), torch.randn(1, 4, 8, device=device)
    models: dict[tuple[str, str], nn.Module | None] = {}
    models["none", "bare loop"], models["none", "first block"] = Loop(), Loop(1, 0)
    for step, settings in STEPS.items():
        models["cachedit", step] = ours(settings)
        models["cache_dit", step] = peer(settings)
    candidates = {key: (lambda model=model: model(*streams)) for key, model in models.items() if model is not None}
    cpu = torch.device("cpu")
    with torch.no_grad():
        counts = {}
        for key, run in candidates.items():
            for _ in range(3):  # the first steps allocate
                run()
            counts[key] = operators(run)
        seconds = paired_medians({str(key): run for key, run in candidates.items()}, cpu, arguments.rounds)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        print(f"{'engine':>10} {'step':>22} {'us':>9} {'above loop':>11} {'operators':>10}")
        for key in candidates:
            loop = str(("none", "bare loop" if key[1] == "computed" else "first block"))
            microseconds = 1e6 * seconds[str(key)]
            row = {
                "date": datetime.date.today().isoformat(),
                "device": device_name(device),
                "torch": torch.__version__,
                "engine": key[0],
                "step": key[1],
                "microseconds": f"{microseconds:.1f}",
                "above_loop_us": "" if key[0] == "none" else f"{microseconds - 1e6 * seconds[loop]:.1f}",
                "operators": counts[key],
            }
            writer.writerow(row)
            print(f"{row['engine']:>10} {row['step']:>22} {row['microseconds']:>9} {row['above_loop_us']:>11} "
                  f"{row['operators']:>10}")  # fmt: skip


if __name__ == "__main__":
    main()
