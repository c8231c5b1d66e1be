"""Pictures of what the cache did in a request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import BasicCacheConfig
from .stats import BranchStats, CacheStats

__all__ = ["Run", "draw_runs", "plot_summary", "save"]


def plot_summary(stats_or_pipe: Any, path: str | Path | None = None) -> Any:
    """Draw the residual difference of each step, the threshold, and the reused steps shaded.

    One row per section and guidance branch.

    Args:
        stats_or_pipe: What ``summary`` returned (the list, or one of its entries), or a pipeline, transformer or
            adapter that the cache is enabled on.
        path: File to write; its ending says the format. Default: none.

    Returns:
        The ``matplotlib.figure.Figure``; closed for ``pyplot`` if it was written.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If there is nothing to draw: the cache is not enabled there, or no step has run.
    """
    runs = [
        Run(f"{entry.transformer}.{entry.blocks}, {name}", branch, entry.cache_options["cache_config"])
        for entry in _as_stats(stats_or_pipe)
        for name, branch in entry.branches.items()
    ]
    if not any(run.branch.records for run in runs):
        raise ValueError("stats_or_pipe: nothing to draw, the cache is not enabled or no step has run")
    figure = draw_runs(runs)
    if path is not None:
        save(figure, path)
    return figure


class Run(NamedTuple):
    """One row of the picture: one guidance branch of one section, and its configuration (None: no cache)."""

    title: str
    branch: BranchStats
    config: BasicCacheConfig | None


def draw_runs(runs: Sequence[Run], every_step: dict[int, float] | None = None) -> Any:
    """Draw one row per run and return the figure.

    Args:
        runs: The rows.
        every_step: Differences to the step before where every step is computed, drawn in each row for comparison.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    figure, axes = plt.subplots(len(runs), 1, figsize=(9, 2.4 * len(runs)), sharey=True, squeeze=False)
    for run, axis in zip(runs, axes[:, 0], strict=True):
        _draw_run(axis, run, every_step or {})
    axes[-1, 0].set_xlabel("denoising step", loc="left")
    labelled: dict[str, Any] = {}
    for axis in axes[:, 0]:
        labelled |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    figure.legend(list(labelled.values()), list(labelled), fontsize=8, loc="lower right", ncols=4, frameon=False)
    return figure


def save(figure: Any, path: str | Path) -> None:
    """Write a figure of :func:`draw_runs` and let go of it."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_run(axis: Any, run: Run, every_step: dict[int, float]) -> None:
    branch, diffs, steps = run.branch, run.branch.diffs, len(run.branch.records)
    label: str | None = "reused"
    for record in branch.records:
        share = record.pruned / record.blocks if record.blocks else float(record.reused)
        if share > 0:  # the more blocks a step pruned, the darker it is
            axis.axvspan(record.step - 0.5, record.step + 0.5, color="#b7d7f0", alpha=share, lw=0, label=label)
            label = None  # one entry in the legend
    if every_step:
        axis.plot(list(every_step), list(every_step.values()), color="0.65", lw=1, label="to the step before")
    if diffs:
        axis.plot(list(diffs), list(diffs.values()), "o", ms=4, color="#1f5a96", label="measured")
        if run.config is not None:
            axis.axhline(run.config.residual_diff_threshold, color="#c0392b", lw=1, ls="--", label="threshold")
    elif branch.reused_steps:
        axis.text(0.01, 0.92, "static mask: nothing is measured", transform=axis.transAxes, va="top", fontsize=8)
    reused = f"{len(branch.reused_steps)} of {steps} steps reused"
    pruned = "" if branch.pruned_ratio is None else f"{branch.pruned_ratio:.0%} of the blocks pruned"
    axis.set_title(f"{run.title}: {pruned or reused}", fontsize=10, loc="left")
    axis.set_xlim(-0.5, steps - 0.5)
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("residual diff")


def _as_stats(stats_or_pipe: Any) -> Sequence[CacheStats]:
    if isinstance(stats_or_pipe, CacheStats):
        return [stats_or_pipe]
    if isinstance(stats_or_pipe, (list, tuple)):
        for entry in stats_or_pipe:
            if not isinstance(entry, CacheStats):
                raise TypeError(f"stats_or_pipe must hold what summary returned, got {type(entry).__name__}")
        return stats_or_pipe
    from .api import summary

    return summary(stats_or_pipe, logging=False)
