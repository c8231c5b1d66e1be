"""What the cache did in a request: numbers, and the table that ``summary`` prints."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from .controller import Controller
from .policy import StepRecord
from .request import Branch

__all__ = ["CacheStats", "collect", "format_table"]


@dataclasses.dataclass
class CacheStats:
    """One section (block lists that share a decision) of one transformer, over the running or last request.

    ``cached_steps`` and ``residual_diffs`` are those of the conditional (or only) branch, ``cfg_cached_steps`` and
    ``cfg_residual_diffs`` of the unconditional one; ``branches`` holds all of them.
    """

    transformer: str = ""
    blocks: str = ""
    cache_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    cached_steps: list[int] = dataclasses.field(default_factory=list)
    residual_diffs: dict[int, float] = dataclasses.field(default_factory=dict)
    cfg_cached_steps: list[int] = dataclasses.field(default_factory=list)
    cfg_residual_diffs: dict[int, float] = dataclasses.field(default_factory=dict)
    computed_steps: list[int] = dataclasses.field(default_factory=list)
    branches: dict[str, list[StepRecord]] = dataclasses.field(default_factory=dict)
    nonfinite_diffs: int = 0
    bytes_held: int = 0
    skipped_blocks: float = 0.0
    """Share of all block calls that were skipped, 0 to 1."""

    @property
    def reused_steps(self) -> list[int]:
        """Same as ``cached_steps``."""
        return self.cached_steps


def collect(controller: Controller) -> list[CacheStats]:
    """Return the statistics of a cached transformer, one entry per section."""
    result = []
    for index, section in enumerate(controller.sections):
        options = copy.deepcopy({"cache_config": section.config, "calibrator_config": section.calibrator_config})
        stats = CacheStats(type(controller.transformer).__name__, section.name, options)
        reused = total = 0
        main, uncond = _main_branch(controller), controller.branches.get("uncond")
        for name, branch in controller.branches.items():
            state = branch.states[index]
            records = list(state.policy.records)
            stats.branches[name] = records
            stats.nonfinite_diffs += state.policy.nonfinite
            stats.bytes_held += state.bytes_held
            reused += sum(record.reused for record in records)
            total += len(records)
        if main is not None:
            records = stats.branches[main.name]
            stats.cached_steps, stats.residual_diffs = _reused(records), _diffs(records)
            stats.computed_steps = [record.step for record in records if not record.reused]
        if uncond is not None and uncond is not main:
            stats.cfg_cached_steps = _reused(stats.branches["uncond"])
            stats.cfg_residual_diffs = _diffs(stats.branches["uncond"])
        stats.skipped_blocks = reused * section.body / (total * section.total) if total else 0.0
        result.append(stats)
    return result


def format_table(stats: list[CacheStats], details: bool = False) -> str:
    """Return the statistics as a markdown table; with ``details`` one row per step follows."""
    rows = [("blocks", "branch", "steps", "reused", "blocks skipped", "diff min", "median", "max", "MB held")]
    for entry in stats:
        for name, records in entry.branches.items():
            diffs = sorted(_diffs(records).values())
            middle = f"{statistics.median(diffs):.4f}" if diffs else "-"
            rows.append(
                (
                    f"{entry.transformer}.{entry.blocks}",
                    name,
                    str(len(records)),
                    str(len(_reused(records))),
                    f"{entry.skipped_blocks:.0%}",
                    f"{diffs[0]:.4f}" if diffs else "-",
                    middle,
                    f"{diffs[-1]:.4f}" if diffs else "-",
                    f"{entry.bytes_held / 1e6:.1f}",
                )
            )
    text = _markdown(rows)
    if details:
        steps = [("blocks", "branch", "step", "decision", "diff", "reason")]
        for entry in stats:
            for name, records in entry.branches.items():
                steps += [
                    (
                        entry.blocks,
                        name,
                        str(r.step),
                        "reused" if r.reused else "computed",
                        "-" if r.diff is None else f"{r.diff:.4f}",
                        r.reason,
                    )
                    for r in records
                ]
        text += "\n\n" + _markdown(steps)
    return text


def _main_branch(controller: Controller) -> Branch | None:
    for name in ("cond", "default"):
        if name in controller.branches:
            return controller.branches[name]
    return next(iter(controller.branches.values()), None)


def _reused(records: list[StepRecord]) -> list[int]:
    return [record.step for record in records if record.reused]


def _diffs(records: list[StepRecord]) -> dict[int, float]:
    return {record.step: record.diff for record in records if record.diff is not None}


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
