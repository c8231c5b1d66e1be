"""The demo's pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from cachedit.plot import Run, draw_runs, save

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


def draw_steps(path: Path, results: Sequence[Result], every_step: dict[int, float]) -> None:
    """Draw each configuration's residual difference per step, its threshold, and the reused steps shaded.

    Args:
        path: File to write.
        results: The cached configurations.
        every_step: The differences where every step is computed and measured, for comparison.
    """
    runs = [Run(result.configuration.name, result.stats, result.configuration.cache) for result in results]
    save(draw_runs(runs, every_step), path)
