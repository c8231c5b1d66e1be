"""What ``cachedit metrics`` found: as a table on the terminal, CSV, Markdown, and a picture of the worst pairs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich.box
import rich.table
import torch

from ..metrics.compare import HIGHER_IS_BETTER, Comparison
from ..metrics.sources import Pair, matched_files, read_pairs

Advance = Callable[[int, int], None]  # of files: done, all

_DIGITS = {"psnr": 2, "ssim": 4, "mse": 3, "lpips": 4, "fid": 3, "clip_score": 2, "image_reward": 4}


@dataclass
class Row:
    """One line: ``logged`` has numbers from a log beside the metrics, None where it has none."""

    name: str
    count: int
    values: dict[str, float]
    logged: dict[str, float | None] = field(default_factory=dict)


class Table:
    """Rows by the first metric, the best on top.

    Args:
        metrics: The columns.
        rows: The lines; a metric that a row lacks stays empty.
    """

    def __init__(self, metrics: Sequence[str], rows: Sequence[Row]):
        self.metrics = list(metrics)
        self.rows = sorted(rows, key=self._place)
        self.logged = list(dict.fromkeys(tag for row in rows for tag in row.logged))

    def _place(self, row: Row) -> float:
        value = row.values.get(self.metrics[0], math.nan) if self.metrics else 0.0
        return math.inf if math.isnan(value) else -value if self.metrics[0] in HIGHER_IS_BETTER else value

    @property
    def titles(self) -> list[str]:
        """The first line."""
        arrows = [f"{name} {'↑' if name in HIGHER_IS_BETTER else '↓'}" for name in self.metrics]
        return ["compared", "count", *arrows, *self.logged]

    def lines(self) -> list[list[str]]:
        """The others, as text."""
        return [
            [
                row.name,
                str(row.count),
                *(_text(row.values.get(name), _DIGITS[name]) for name in self.metrics),
                *(_text(row.logged.get(tag), 2) for tag in self.logged),
            ]
            for row in self.rows
        ]

    def rich(self) -> rich.table.Table:
        """For a terminal."""
        table = rich.table.Table(box=rich.box.SIMPLE)
        for number, title in enumerate(self.titles):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for line in self.lines():
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """A table in Markdown."""
        rows = [self.titles, ["---", *["---:"] * (len(self.titles) - 1)], *self.lines()]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def csv(self) -> str:
        """Comma-separated, all digits, the names without arrows."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["compared", "count", *self.metrics, *self.logged])
        for row in self.rows:
            values = [row.values.get(name) for name in self.metrics]
            writer.writerow([row.name, row.count, *values, *(row.logged.get(tag) for tag in self.logged)])
        return text.getvalue()


def draw_worst(path: Path, compared: Sequence[tuple[str, str, Comparison]], count: int) -> None:
    """Draw the worst pairs, one per line: baseline, other, and how far they are apart per pixel.

    Args:
        path: File to write.
        compared: Baseline, other, and what comparing them gave; pairs are ranked by the first metric that they have.
        count: How many pairs to draw at most.

    Raises:
        ValueError: If no pair has a value.
    """
    metric = next((name for _, _, result in compared for _, values in result.pairs for name in values), None)
    if metric is None or count < 1:
        raise ValueError("--worst needs at least one pair and one of psnr, ssim, mse, lpips")
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    ranked = sorted(
        (sign * values[metric], number, place)
        for number, (_, _, result) in enumerate(compared)
        for place, (_, values) in enumerate(result.pairs)
    )[:count]
    read = {number: _read(*compared[number][:2], {place for _, n, place in ranked if n == number})
            for number in {number for _, number, _ in ranked}}  # fmt: skip
    pairs = [read[number][place] for _, number, place in ranked]
    others = [Path(compared[number][1]).name for _, number, _ in ranked]
    titles = [f"{other}{'' if pair.name.startswith(other) else f': {pair.name}'}\n{metric} {sign * value:.4g}"
              for other, pair, (value, _, _) in zip(others, pairs, ranked, strict=True)]  # fmt: skip
    _draw(path, pairs, titles)


def _read(true: str, test: str, places: set[int]) -> dict[int, Pair]:
    every = (pair for file in matched_files(true, test) for pair in read_pairs(*file))
    return {place: pair for place, pair in enumerate(every) if place in places}


def _draw(path: Path, pairs: Sequence[Pair], titles: Sequence[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(pairs), 3, figsize=(9, 3.2 * len(pairs)), squeeze=False)
    for pair, title, (left, middle, right) in zip(pairs, titles, axes, strict=True):
        left.imshow(pair.true.permute(1, 2, 0).numpy(), interpolation="nearest")
        middle.imshow(pair.test.permute(1, 2, 0).numpy(), interpolation="nearest")
        apart = (pair.true.to(torch.int16) - pair.test.to(torch.int16)).abs().amax(0)
        drawn = right.imshow(apart.numpy(), cmap="inferno", vmin=0, interpolation="nearest")
        figure.colorbar(drawn, ax=right, fraction=0.046)
        for axis, text in ((left, "baseline"), (middle, title), (right, "largest difference of a channel, of 255")):
            axis.set_title(text, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else "same" if math.isinf(value) else f"{value:.{digits}f}"
