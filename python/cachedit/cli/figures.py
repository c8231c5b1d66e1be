"""The demo's pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from .demo import Result


def draw_images(path: Path, rows: Sequence[tuple[str, torch.Tensor]], prompts: Sequence[str]) -> None:
    """Draw pictures [B, 3, H, W] in 0 to 1: a row per configuration, a column per prompt."""
    figure, axes = plt.subplots(
        len(rows), len(prompts), figsize=(1.5 * len(prompts) + 1.6, 1.5 * len(rows) + 0.9), squeeze=False
    )
    for (name, images), line in zip(rows, axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(textwrap.fill(name, 14), rotation=0, ha="right", va="center", fontsize=9)
    for prompt, axis in zip(prompts, axes[0], strict=True):
        axis.set_title(textwrap.fill(prompt, 20), fontsize=7)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_steps(path: Path, results: Sequence[Result], every_step: dict[int, float], steps: int) -> None:
    """Draw each configuration's residual difference per step, its threshold, and the reused steps shaded.

    Args:
        path: File to write.
        results: The cached configurations.
        every_step: The differences where every step is computed and measured, for comparison.
        steps: Number of denoising steps.
    """
    figure, axes = plt.subplots(len(results), 1, figsize=(9, 2.4 * len(results)), sharex=True, squeeze=False)
    for result, axis in zip(results, axes[:, 0], strict=True):
        _draw_run(axis, result, every_step)
        axis.set_xlim(-0.5, steps - 0.5)
        axis.set_ylabel("residual diff")
        axis.set_title(
            f"{result.configuration.name}: {len(result.reused_steps)} of {steps} steps reused", fontsize=10, loc="left"
        )
    axes[-1, 0].set_xlabel("denoising step")
    axes[0, 0].legend(fontsize=8, loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_run(axis: Any, result: Result, every_step: dict[int, float]) -> None:
    for i, step in enumerate(result.reused_steps):
        axis.axvspan(step - 0.5, step + 0.5, color="#b7d7f0", lw=0, label="reused" if i == 0 else None)
    axis.plot(list(every_step), list(every_step.values()), color="0.65", lw=1, label="to the step before")
    config = result.configuration.cache
    if result.diffs and config is not None:
        axis.plot(list(result.diffs), list(result.diffs.values()), "o", ms=4, color="#1f5a96", label="measured")
        axis.axhline(config.residual_diff_threshold, color="#c0392b", lw=1, ls="--", label="threshold")
    elif result.reused_steps:
        note = "static mask: nothing is measured"
        axis.text(0.01, 0.92, note, transform=axis.transAxes, va="top", fontsize=8)
    axis.set_ylim(bottom=0)
