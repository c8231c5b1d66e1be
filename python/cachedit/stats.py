"""What the cache did in a request: numbers, and the table that ``summary`` prints."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .controller import Controller
from .policy import StepRecord

__all__ = ["BranchStats", "CacheStats", "collect", "format_table"]

_UNCONDITIONAL = ("uncond", "pred_uncond")  # as pipelines and diffusers' guiders name the branch


@dataclasses.dataclass
class BranchStats:
    """One section on one guidance branch, over the running or last request. Steps count from 0 within the request.

    Args:
        records: What happened, one entry per step.
        body: Blocks that a reused step skips.
        total: Blocks of the section.
        bytes_held: Bytes of the stored residuals and of what differences are measured against.
        nonfinite_diffs: Steps whose difference was NaN or infinite; they were computed.
    """

    records: list[StepRecord] = dataclasses.field(default_factory=list)
    body: int = 0
    total: int = 0
    bytes_held: int = 0
    nonfinite_diffs: int = 0

    @property
    def computed_steps(self) -> list[int]:
        """Steps that were not reused."""
        return [record.step for record in self.records if not record.reused]

    @property
    def reused_steps(self) -> list[int]:
        """Steps that reused the body."""
        return [record.step for record in self.records if record.reused]

    @property
    def runs(self) -> list[int]:
        """Lengths of the runs of reused steps, in order."""
        return [len(list(run)) for reused, run in groupby(self.records, lambda record: record.reused) if reused]

    @property
    def diffs(self) -> dict[int, float]:
        """The relative difference at each step that measured one."""
        return {record.step: record.diff for record in self.records if record.diff is not None}

    def diff_percentile(self, percent: float) -> float | None:
        """Percentile of the finite differences, linear between neighbours; None if nothing was measured."""
        values = sorted(diff for diff in self.diffs.values() if math.isfinite(diff))
        if not values:
            return None
        position = (len(values) - 1) * percent / 100
        below = math.floor(position)
        above = min(below + 1, len(values) - 1)
        return values[below] + (values[above] - values[below]) * (position - below)

    @property
    def pruned_steps(self) -> list[int]:
        """Steps that pruned at least one block."""
        return [record.step for record in self.records if record.pruned]

    @property
    def pruned_blocks(self) -> list[int]:
        """Blocks pruned, one entry per step; empty where nothing is pruned block by block."""
        return [record.pruned for record in self.records if record.blocks]

    @property
    def actual_blocks(self) -> list[int]:
        """Blocks of the section, one entry per step; empty where nothing is pruned block by block."""
        return [record.blocks for record in self.records if record.blocks]

    @property
    def pruned_ratio(self) -> float | None:
        """Share of the blocks that was pruned, 0 to 1; None where nothing is pruned block by block."""
        blocks = sum(self.actual_blocks)
        return sum(self.pruned_blocks) / blocks if blocks else None

    @property
    def skipped_blocks(self) -> float:
        """Share of all block calls that were skipped, by reuse or by pruning, 0 to 1."""
        if not self.records or not self.total:
            return 0.0
        skipped = sum(record.pruned if record.blocks else self.body * record.reused for record in self.records)
        return skipped / (self.total * len(self.records))


@dataclasses.dataclass
class CacheStats:
    """One section (block lists that share a decision) of one transformer, over the running or last request.

    ``branches`` holds everything. What users of ``cache_dit`` read is there by its names: ``cached_steps`` and so on
    are those of the conditional (or only) branch, ``cfg_cached_steps`` and so on those of the unconditional one.

    Args:
        transformer: Class name of the transformer.
        blocks: Names of the section's block lists.
        cache_options: A copy of the ``cache_config`` and the ``calibrator_config`` (or None), under these keys.
        branches: Per guidance branch, in the order in which they were first called.
    """

    transformer: str = ""
    blocks: str = ""
    cache_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    branches: dict[str, BranchStats] = dataclasses.field(default_factory=dict)

    @property
    def main(self) -> BranchStats:
        """The conditional (or only) branch; empty before the first step."""
        return next((b for name, b in self.branches.items() if name not in _UNCONDITIONAL), BranchStats())

    @property
    def uncond(self) -> BranchStats:
        """The unconditional branch; empty where there is none of its own."""
        return next((b for name, b in self.branches.items() if name in _UNCONDITIONAL), BranchStats())

    @property
    def bytes_held(self) -> int:
        """Bytes held for all branches."""
        return sum(branch.bytes_held for branch in self.branches.values())

    @property
    def computed_steps(self) -> list[int]:
        return self.main.computed_steps

    @property
    def cached_steps(self) -> list[int]:
        return self.main.reused_steps

    @property
    def residual_diffs(self) -> dict[str, float]:
        return {str(step): diff for step, diff in self.main.diffs.items()}

    @property
    def pruned_steps(self) -> list[int]:
        return self.main.pruned_steps

    @property
    def pruned_blocks(self) -> list[int]:
        return self.main.pruned_blocks

    @property
    def actual_blocks(self) -> list[int]:
        return self.main.actual_blocks

    @property
    def pruned_ratio(self) -> float | None:
        return self.main.pruned_ratio

    @property
    def cfg_cached_steps(self) -> list[int]:
        return self.uncond.reused_steps

    @property
    def cfg_residual_diffs(self) -> dict[str, float]:
        return {str(step): diff for step, diff in self.uncond.diffs.items()}

    @property
    def cfg_pruned_steps(self) -> list[int]:
        return self.uncond.pruned_steps

    @property
    def cfg_pruned_blocks(self) -> list[int]:
        return self.uncond.pruned_blocks

    @property
    def cfg_actual_blocks(self) -> list[int]:
        return self.uncond.actual_blocks

    @property
    def cfg_pruned_ratio(self) -> float | None:
        return self.uncond.pruned_ratio


def collect(controller: Controller) -> list[CacheStats]:
    """Return the statistics of a cached transformer, one entry per section."""
    result = []
    for index, section in enumerate(controller.sections):
        options = {"cache_config": section.config, "calibrator_config": section.calibrator_config}
        stats = CacheStats(type(controller.transformer).__name__, section.name, copy.deepcopy(options))
        for name, branch in controller.branches.items():
            state = branch.states[index]
            policy = state.policy
            stats.branches[name] = BranchStats(
                list(policy.records), section.body, section.total, state.bytes_held, policy.nonfinite
            )
        result.append(stats)
    return result


_PERCENTILES = {f"Diffs P{percent:02}": percent for percent in (0, 25, 50, 75, 95)}
_PERCENTILES |= {"Diffs Min": 0, "Diffs Max": 100}  # P00 again: the columns are those that users know


def format_table(stats: Sequence[CacheStats], details: bool = False) -> str:
    """Return a markdown table with one row per section and branch; with ``details`` one row per step follows."""
    rows = [(entry, name, branch) for entry in stats for name, branch in entry.branches.items()]
    prunes = any(branch.actual_blocks for _, _, branch in rows)
    lines = [
        [
            "Blocks",
            "Branch",
            "Steps",
            "Cache Steps",
            "Longest Run",
            *(["Pruned Blocks"] if prunes else []),
            "Skipped",
            *_PERCENTILES,
            "Non-finite",
            "MB Held",
        ]
    ]
    for entry, name, branch in rows:
        lines.append(
            [
                f"{entry.transformer}.{entry.blocks}",
                name,
                str(len(branch.records)),
                str(len(branch.reused_steps)),
                str(max(branch.runs, default=0)),
                *([str(sum(branch.pruned_blocks))] if prunes else []),
                f"{branch.skipped_blocks:.0%}",
                *(_number(branch.diff_percentile(percent)) for percent in _PERCENTILES.values()),
                str(branch.nonfinite_diffs),
                f"{branch.bytes_held / 1e6:.1f}",
            ]
        )
    table = _markdown(lines)
    if details:
        table += "\n\n" + _markdown([["Blocks", "Branch", "Step", "Decision", "Diff", "Reason"], *_step_rows(rows)])
    return table


def _step_rows(rows: list[tuple[CacheStats, str, BranchStats]]) -> list[list[str]]:
    return [
        [entry.blocks, name, str(record.step), _decision(record), _number(record.diff), record.reason]
        for entry, name, branch in rows
        for record in branch.records
    ]


def _decision(record: StepRecord) -> str:
    if record.blocks:
        return f"pruned {record.pruned} of {record.blocks}"
    return "reused" if record.reused else "computed"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
