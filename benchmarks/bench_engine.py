"""Host time and operator calls of the cache itself, around 57 blocks that do nothing.

    python benchmarks/bench_engine.py [--device cuda] [--rounds 50] [--csv PATH]

Rows: a step that is computed, one that is measured and reused, one that a static mask reuses; ours and, where they are
installed, cache_dit and diffusers' FirstBlockCache on the same model, in turns in one process. "above 57" is the time
above the bare loop over all blocks, "above own" that above a bare loop over what the step runs: the first block
where it is reused. What is left of a compiled step is the host's time around and between its passes: dynamo's guards,
the decision, launches; the blocks themselves are one addition or nothing.
"""

from __future__ import annotations

import argparse
import contextlib
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
from common import append, device_name

RESULTS = Path(__file__).parent / "results" / "engine.csv"
FOREVER = 10**9
STEPS = {
    "computed": {"max_continuous_cached_steps": 0},
    "reused": {"residual_diff_threshold": 1.0},
    "reused, static mask": {
        "steps_computation_mask": [1] + [0] * 10**6,
        "steps_computation_policy": "static",
    },
}
FIRST_BLOCK_THRESHOLDS = {"computed": -1.0, "reused": 1.0}


class EmptyBlock(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states, hidden_states


class FirstBlock(nn.Module):
    """Has a residual, the same at each step: what is measured is 0, not 0 / 0."""

    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states, torch.neg(hidden_states)


class Loop(nn.Module):
    """FLUX's shape: 19 double and 38 single blocks."""

    def __init__(self, duals: int = 19, singles: int = 38):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([FirstBlock(), *(EmptyBlock() for _ in range(duals - 1))])
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


def first_block_cache(step: str) -> nn.Module | None:
    """It has no forecasts and no masks."""
    try:
        from diffusers import CacheMixin, FirstBlockCacheConfig
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:
        return None
    if step not in FIRST_BLOCK_THRESHOLDS:
        return None
    for block in (FirstBlock, EmptyBlock):
        TransformerBlockRegistry.register(block, TransformerBlockMetadata(1, 0))
    model = type("Loop", (Loop, CacheMixin), {})()
    model.enable_cache(FirstBlockCacheConfig(FIRST_BLOCK_THRESHOLDS[step]))
    model.context = model.cache_context("default")
    model.context.__enter__()  # for good: ours and cache_dit's are timed without one
    return model


def operators(step: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    # tolist() calls two operators that do nothing on their way to read the sums.
    nothing = ("aten::resolve_conj", "aten::resolve_neg")
    return sum("::" in event.name and event.name not in nothing for event in profiler.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=50, help="turns that each candidate takes; medians are reported")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="history to add to (default: %(default)s)")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    streams = torch.randn(1, 16, 8, device=device), torch.randn(1, 4, 8, device=device)
    models: dict[tuple[str, str], nn.Module | None] = {}
    models["none", "bare loop"], models["none", "first block"] = Loop(), Loop(1, 0)
    models["none", "compiled loop"] = torch.compile(Loop(), fullgraph=True)
    for step, settings in STEPS.items():
        models["cachedit", step] = ours(settings)
        models["cachedit, compiled", step] = torch.compile(ours(settings), fullgraph=True)
        models["cache_dit", step] = peer(settings)
        models["FirstBlockCache", step] = first_block_cache(step)
    candidates = {key: (lambda model=model: model(*streams)) for key, model in models.items() if model is not None}
    with torch.no_grad():
        counts = {}
        for key, run in candidates.items():
            for _ in range(3):  # the first steps allocate
                run()
            counts[key] = operators(run) - 1  # that of the first block
        host = torch.device("cpu")  # its clock on a GPU, too, where there is hardly anything to wait for
        # Turns that are long enough to forget what the candidate before has left in the caches.
        turns = {str(key): run for key, run in candidates.items()}
        seconds = paired_medians(turns, host, arguments.rounds, min_seconds=2e-2)
    print(f"{'engine':>16} {'step':>20} {'us':>7} {'above 57':>9} {'above own':>10} {'operators':>10}")
    for key in candidates:
        engine, step = key
        own = "bare loop" if step == "computed" else "first block"
        us, whole, run = (1e6 * seconds[str(name)] for name in (key, ("none", "bare loop"), ("none", own)))
        row = {
            "date": datetime.date.today().isoformat(),
            "device": device_name(device),
            "torch": torch.__version__,
            "engine": engine,
            "step": step,
            "microseconds": f"{us:.1f}",
            "above_57_us": "" if engine == "none" else f"{us - whole:.1f}",
            "above_own_us": "" if engine == "none" else f"{us - run:.1f}",
            "operators": counts[key],
        }
        append(arguments.csv, row)
        print(f"{engine:>16} {step:>20} {row['microseconds']:>7} {row['above_57_us']:>9} "
              f"{row['above_own_us']:>10} {row['operators']:>10}")  # fmt: skip


if __name__ == "__main__":
    main()
