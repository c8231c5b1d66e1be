"""cachedit and cache_dit side by side: do they decide alike, draw alike, and how long do they take?

    python benchmarks/compare_cache_dit.py [--models embedded Flux] [--cases DBPrune] [--rounds 5] [--csv PATH]

Each package gets a fresh copy of the pipeline in each case. Hooks on the blocks tell what really ran, whatever the
packages report. The exit code is 1 if a case that is meant to come out equal does not (see docs/differences.md).
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_dit
import diffusers
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import cachedit
from cachedit.models import find_entry, find_transformers
from cachedit_kernels.testing.timing import paired_medians
from common import append, machine
from compare_cases import BASE, CASES, MODELS, STEPS, Case, Model

RESULTS = Path(__file__).parent / "results" / "compare_cache_dit.csv"
TOLERANCE = 8  # times the effect of a last bit: different orders of rounding add up (5 times is the most seen)
COLUMNS = (
    *("date", "device", "threads", "torch", "diffusers", "cache_dit", "model", "case", "forwards", "computed"),
    *("computed_peer", "blocks", "blocks_run", "blocks_run_peer", "same_decisions", "max_difference"),
    *("mean_difference", "rounding", "effect", "effect_peer", "seconds", "seconds_peer", "peer_over_ours", "verdict"),
)
PRINTED = (
    *("model", "case", "computed", "decisions", "max diff", "mean diff", "effect", "ours, s", "theirs/ours"),
    "verdict",
)
Run = Callable[[Any], torch.Tensor]
Decisions = list[list[list[int]]]  # transformer, forward: the blocks that ran


@dataclass
class Subject:
    """A pipeline to copy, how to run it, and what it gives without a cache.

    ``rounding`` is the largest change of the output when the last layer's weights change in their last bit.
    """

    pipe: Any
    class_name: str
    run: Run
    plain: torch.Tensor
    rounding: float

    @classmethod
    def of(cls, model: Model) -> Subject:
        pipe, class_name, run = model.build()
        plain = run(pipe)
        nudged = copy.deepcopy(pipe)
        for transformer in find_transformers(nudged):
            weight: torch.Tensor = transformer.proj_out.weight.data  # type: ignore[union-attr, assignment]
            weight.mul_(1 + torch.finfo(weight.dtype).eps)
        return cls(pipe, class_name, run, plain, (run(nudged) - plain).abs().max().item())

    def fresh(self) -> Any:
        """A copy with a class of its own: cache_dit patches classes, and looks pipelines up by their class's name."""
        pipe = copy.deepcopy(self.pipe)
        pipe.__class__ = type(self.class_name, (type(pipe),), {})
        return pipe


def compare(subject: Subject, model: Model, case: Case, rounds: int) -> dict[str, Any]:
    """Run one case with both packages and return a row."""
    outputs: list[torch.Tensor] = []
    decisions: list[Decisions] = []
    candidates: dict[str, Callable[[], object]] = {}
    for package in (cachedit, cache_dit):
        pipe = subject.fresh()
        enable(package, pipe, model, case)
        with counting(pipe) as ran:
            outputs.append(subject.run(pipe))
        decisions.append(ran)
        candidates[package.__name__] = lambda pipe=pipe: subject.run(pipe)
    difference = (outputs[0] - outputs[1]).abs()
    same = decisions[0] == decisions[1]
    equal = same and difference.max().item() <= TOLERANCE * subject.rounding
    forwards = [[len(blocks) for calls in one for blocks in calls] for one in decisions]
    total = sum(len(list_) for _, list_ in block_lists(find_transformers(subject.pipe)[0]))
    row: dict[str, Any] = {
        "model": model.name,
        "case": case.name,
        "forwards": len(forwards[0]),
        "blocks": len(forwards[0]) * total,
        "same_decisions": same,
        "max_difference": f"{difference.max().item():.1e}",
        "mean_difference": f"{difference.mean().item():.1e}",
        "rounding": f"{subject.rounding:.1e}",
        "verdict": "equal" if equal else case.differs or model.differs or "NOT EQUAL",
    }
    for suffix, counts, output in zip(("", "_peer"), forwards, outputs, strict=True):
        row[f"computed{suffix}"] = counts.count(total)
        row[f"blocks_run{suffix}"] = sum(counts)
        row[f"effect{suffix}"] = f"{(output - subject.plain).abs().mean().item():.1e}"
    if rounds:
        ours, peer = paired_medians(candidates, torch.device("cpu"), rounds).values()
        row |= {"seconds": f"{ours:.4f}", "seconds_peer": f"{peer:.4f}", "peer_over_ours": f"{peer / ours:.2f}"}
    return row


def enable(package: Any, pipe: Any, model: Model, case: Case) -> None:
    """Put a package's cache on a pipeline."""
    threshold = model.prune_threshold if case.prunes else model.threshold
    fields = BASE | {"residual_diff_threshold": threshold} | case.cache
    if isinstance(fields.get("steps_computation_mask"), str):
        fields["steps_computation_mask"] = package.steps_mask(
            total_steps=STEPS, mask_policy=fields["steps_computation_mask"]
        )
    config = (package.DBPruneConfig if case.prunes else package.DBCacheConfig)(**fields)
    calibrator = None if case.calibrator is None else getattr(package, case.calibrator[0])(**case.calibrator[1])
    package.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)


@contextmanager
def counting(pipe: Any) -> Iterator[Decisions]:
    """Inside, take down which blocks run in each forward of each transformer. The first block always runs."""
    ran: Decisions = []
    handles = []
    for transformer in find_transformers(pipe):
        calls: list[list[int]] = []
        ran.append(calls)
        blocks = [block for _, list_ in block_lists(transformer) for block in list_]
        for number, block in enumerate(blocks):

            def note(module: Any, args: Any, number: int = number, calls: list[list[int]] = calls) -> None:
                if number == 0:
                    calls.append([])
                calls[-1].append(number)

            handles.append(block.register_forward_pre_hook(note))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def block_lists(transformer: Any) -> list[tuple[str, torch.nn.ModuleList]]:
    """The block lists of a transformer that the model table knows, in calling order."""
    entry = find_entry(transformer)
    assert entry is not None
    return [(item.name, transformer.get_submodule(item.name)) for group in entry.sections for item in group]


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(box=MARKDOWN)
    for name in PRINTED:
        result.add_column(name, no_wrap=True)
    for row in rows:
        pruned = row["case"].startswith("DBPrune")
        kind, of, unit = ("blocks_run", "blocks", " blocks") if pruned else ("computed", "forwards", "")
        result.add_row(
            row["model"],
            row["case"],
            f"{row[kind]}, {row[kind + '_peer']} of {row[of]}{unit}",
            "equal" if row["same_decisions"] else "differ",
            row["max_difference"],
            row["mean_difference"],
            row["effect_peer"],
            row.get("seconds", ""),
            row.get("peer_over_ours", ""),
            row["verdict"],
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cases", nargs="+", help="only cases whose names begin with one of these")
    parser.add_argument("--rounds", type=int, default=5, help="turns per package; medians are reported; 0: no times")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="history to add to (default: %(default)s)")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # cache_dit reports each case at length
    rows = []
    for model in MODELS:
        cases = [
            case
            for case in CASES
            if model.name in case.models and (not arguments.cases or case.name.startswith(tuple(arguments.cases)))
        ]
        if model.name in arguments.models and cases:
            subject = Subject.of(model)
            rows += [compare(subject, model, case, arguments.rounds) for case in cases]
            if not torch.equal(subject.run(subject.pipe), subject.plain):
                raise RuntimeError(f"{model.name}: the copies were not apart, the original draws something else now")
    versions = {"diffusers": diffusers.__version__, "cache_dit": cache_dit.__version__}
    for row in rows:
        row = machine(torch.device("cpu")) | versions | row
        append(arguments.csv, {column: row.get(column, "") for column in COLUMNS})
    console = Console() if sys.stdout.isatty() else Console(width=240)
    console.print(f"cachedit {cachedit.__version__} and cache_dit {cache_dit.__version__}, in this order")
    console.print(table(rows))
    unequal = sum(row["verdict"] == "NOT EQUAL" for row in rows)
    console.print(f"{len(rows)} cases, {unequal} of them not equal without a reason; added to {arguments.csv}")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
