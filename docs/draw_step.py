"""Draws docs/step.png, the picture of one denoising step in docs/architecture.md.

python docs/draw_step.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLOCK, KERNEL, HOST = "#dfe7ef", "#cfe8d5", "#f6e3c5"


def box(axis, x, y, width, height, text, colour, size=9):
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.06", fc=colour, ec="0.35")
    )
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axis, start, end, text="", dx=0.0, dy=0.0, style="-", colour="0.25", bend=0.0):
    axis.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, lw=1.1, ls=style, color=colour,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip
    if text:
        middle = (start[0] + end[0]) / 2 + dx, (start[1] + end[1]) / 2 + dy
        axis.text(*middle, text, fontsize=8, ha="center", color=colour)


def main() -> None:
    figure, axis = plt.subplots(figsize=(11, 5.2))
    axis.set_xlim(0, 11)
    axis.set_ylim(0.1, 5.3)
    axis.axis("off")

    # The model, left to right.
    box(axis, 0.2, 2.5, 1.5, 0.8, "head\nblocks 0 .. Fn-1\nalways computed", BLOCK)
    box(axis, 4.6, 4.0, 2.0, 0.8, "body\nblocks Fn .. N-Bn-1", BLOCK)
    box(axis, 9.2, 2.5, 1.6, 0.8, "tail\nlast Bn blocks\nalways computed", BLOCK)

    # What the cache adds.
    box(axis, 2.4, 2.5, 1.6, 0.8, "residual_l1\n(before, after, anchor)\n2 sums", KERNEL)
    box(axis, 4.75, 2.5, 1.7, 0.8, "policy.decide\nplain Python\nthe only sync", HOST)
    box(axis, 7.2, 4.0, 1.6, 0.8, "residual_push\nring[slot] = out - in", KERNEL)
    box(axis, 4.6, 0.7, 2.0, 0.8, "forecaster\nK weights\nfrom step numbers", HOST)
    box(axis, 7.2, 0.7, 1.6, 0.8, "residual_forecast\nh + sum w[k] ring[k]", KERNEL)
    box(axis, 7.25, 2.35, 1.5, 0.95, "ring\nlast K residuals\nper stream", "white")
    box(axis, 2.5, 4.0, 1.4, 0.8, "anchor\nhead residual", "white")

    arrow(axis, (1.74, 2.9), (2.36, 2.9))
    arrow(axis, (4.04, 2.9), (4.71, 2.9), "diff", dy=0.08)
    arrow(axis, (5.6, 3.34), (5.6, 3.96), "compute", dx=0.42, dy=-0.03, colour="#a33")
    arrow(axis, (6.64, 4.4), (7.16, 4.4), colour="#a33")
    arrow(axis, (8.0, 3.96), (8.0, 3.36), style=":", colour="#a33")
    arrow(axis, (5.1, 3.34), (3.94, 4.2), style=":", colour="#a33", bend=0.0)
    arrow(axis, (8.84, 4.4), (10.0, 3.34), colour="#a33", bend=-0.3)
    arrow(axis, (3.2, 3.96), (3.2, 3.34), style=":")
    arrow(axis, (5.6, 2.46), (5.6, 1.54), "reuse", dx=0.33, dy=-0.03, colour="#26c")
    arrow(axis, (6.64, 1.1), (7.16, 1.1), "weights", dy=0.08, colour="#26c")
    arrow(axis, (8.84, 1.1), (10.0, 2.46), colour="#26c", bend=0.3)
    arrow(axis, (8.0, 2.31), (8.0, 1.54), style=":", colour="#26c")

    for x, colour, text in ((0.3, BLOCK, "the model's blocks"), (2.5, KERNEL, "one operator call, all streams"),
                            (5.4, HOST, "host, no tensors")):  # fmt: skip
        box(axis, x, 0.18, 0.24, 0.2, "", colour)
        axis.text(x + 0.34, 0.28, text, fontsize=8, va="center")
    axis.text(7.6, 0.28, "dotted: stored from step to step", fontsize=8, va="center")
    figure.tight_layout(pad=0.2)
    figure.savefig(Path(__file__).parent / "step.png", dpi=110)


if __name__ == "__main__":
    main()
