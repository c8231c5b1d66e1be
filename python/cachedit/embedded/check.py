"""The pixel check: does a picture show what its prompt says? ``python -m cachedit.embedded.check``

Nothing here knows the network; everything comes from the drawing code. For every object of the scene, at its place,
all 192 looks (6 shapes, 8 colours, 2 sizes, 2 fills) are laid over the picture in many positions, turns and stripe
phases, each with its shadow, and compared pixel by pixel; "nothing there" competes too. An object is right when the
best of all is the look that the prompt asks for. A picture is right when all of its objects and its background are, and
nothing else stands in it. The command draws held-out prompts, prints a table and exits with 1 below 90%.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import draw
from .draw import BACKGROUND_PALETTE, IMAGE_SIZE, PALETTE, RADII, object_centre
from .prompt import describe
from .scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, SceneObject, sample_scene

CROP = 24
PAD = CROP // 2
SHIFTS = tuple(step * 0.5 for step in range(-3, 4))
TURNS = (-0.08, 0.08)
PHASES = 8
MAX_STRAY_PIXELS = 10
BAR = 0.9


@dataclass
class ObjectVerdict:
    """What was asked for, and what was found there: (size, fill, colour, shape), or None for nothing."""

    expected: SceneObject
    found: tuple[str, str, str, str] | None

    @property
    def right(self) -> bool:
        return self.found == self.expected.appearance


@dataclass
class Verdict:
    """One picture: its objects, the background's colour word, and how many pixels belong to nothing."""

    scene: Scene
    objects: list[ObjectVerdict]
    background: str
    stray_pixels: int

    @property
    def right(self) -> bool:
        others = self.background == self.scene.background and self.stray_pixels <= MAX_STRAY_PIXELS
        return others and all(item.right for item in self.objects)

    def problems(self) -> list[str]:
        """In words, what is wrong."""
        out = [
            f"{' '.join(item.expected.appearance)} -> {' '.join(item.found) if item.found else 'nothing'}"
            for item in self.objects
            if not item.right
        ]
        if self.background != self.scene.background:
            out.append(f"background {self.scene.background} -> {self.background}")
        if self.stray_pixels > MAX_STRAY_PIXELS:
            out.append(f"{self.stray_pixels} stray pixels")
        return out


@dataclass
class CheckResult:
    """Verdicts of a run, and the seconds that drawing took."""

    verdicts: list[Verdict]
    seconds: float

    @property
    def share(self) -> float:
        return sum(verdict.right for verdict in self.verdicts) / len(self.verdicts)


@dataclass
class _Bank:
    """Templates around one sub-pixel centre: rows are (shape, size, shift, turn), columns the pixels of a crop."""

    looks: list[tuple[int, int]]  # (shape, size) of each row
    poses: list[tuple[float, float, float]]  # (x, y, turn) of each row
    cover: torch.Tensor  # [T, P]
    below: torch.Tensor  # [T, P], what is left of the picture below
    own: torch.Tensor  # [8 * (1 + PHASES), 3, P]: plain colours, then striped ones by colour and phase


@functools.lru_cache(maxsize=64)
def _bank(fraction_x: float, fraction_y: float) -> _Bank:
    axis = torch.arange(CROP) + 0.5 - PAD
    dx = (axis - fraction_x)[None, :].expand(CROP, CROP)
    dy = (axis - fraction_y)[:, None].expand(CROP, CROP)
    rows = list(itertools.product(range(len(SHAPES)), range(len(SIZES)), SHIFTS, SHIFTS, TURNS))
    shape = torch.tensor([row[0] for row in rows])
    radius = torch.tensor(RADII)[torch.tensor([row[1] for row in rows])]
    x, y, turn = (torch.tensor([row[index] for row in rows]) for index in (2, 3, 4))
    nothing = torch.zeros(len(rows))
    light, cover, _ = draw.layer(
        shape,
        torch.zeros(len(rows), 3),
        radius,
        nothing,
        nothing,
        dx[None] - x[:, None, None],
        dy[None] - y[:, None, None],
        turn,
    )
    colours, phases = PALETTE.repeat(1 + PHASES, 1), torch.arange(PHASES) / PHASES
    count = len(PALETTE)
    _, _, own = draw.layer(
        torch.zeros(len(colours), dtype=torch.int64),
        colours,
        torch.full((len(colours),), 5.0),
        torch.tensor([0.0] * count + [1.0] * count * PHASES),
        torch.cat([torch.zeros(count), phases.repeat_interleave(count)]),
        dx.expand(len(colours), -1, -1),
        dy.expand(len(colours), -1, -1),
        torch.zeros(len(colours)),
    )
    return _Bank(
        looks=[row[:2] for row in rows],
        poses=[row[2:] for row in rows],
        cover=cover.flatten(1),
        below=(light * (1 - cover)).flatten(1),
        own=own.flatten(2),
    )


def _errors(
    bank: _Bank, rows: slice, columns: torch.Tensor, image: torch.Tensor, under: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Squared error [T, C] of every template and paint against ``image`` [3, P], over ``under`` [3, P]."""
    cover, below, own = bank.cover[rows], bank.below[rows], bank.own[columns]
    weighted = weight * image
    constant = (weighted * image).sum()
    lower = below.square() @ (weight * under.square()).sum(0) - 2 * below @ (weighted * under).sum(0)
    upper = cover.square() @ (weight * own.square()).sum(1).T - 2 * cover @ (weighted * own).sum(1).T
    both = 2 * (below * cover) @ (weight * under * own).sum(1).T
    return constant + lower[:, None] + upper + both


class _Reading:
    """The examination of one picture [3, 32, 32]."""

    def __init__(self, image: torch.Tensor, scene: Scene) -> None:
        self.image, self.scene = image, scene
        self.centres = [object_centre(item.column, item.row, item.layer) for item in scene.objects]
        self.poses = [(0.0, 0.0, 0.0, 0.0)] * len(scene.objects)  # x, y, turn, phase
        self.axis = torch.arange(IMAGE_SIZE) + 0.5
        self.empty = self._empty_pixels()
        self.backdrop = self._backdrop()

    def _empty_pixels(self) -> torch.Tensor:
        """Where nothing should be, bool [32, 32]."""
        empty = torch.ones(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
        for item, (x, y) in zip(self.scene.objects, self.centres, strict=True):
            reach = RADII[SIZES.index(item.size)] * 1.2 + 2.0
            empty &= torch.hypot(self.axis[None, :] - x, self.axis[:, None] - y) > reach
        return empty

    def _backdrop(self) -> torch.Tensor:
        """A smooth surface through the empty pixels, [3, 32, 32]."""
        x, y = torch.meshgrid(self.axis / 16 - 1, self.axis / 16 - 1, indexing="xy")
        terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)
        ridge = torch.diag(torch.tensor([0.0, 0.1, 0.1, 1.0, 1.0, 1.0]))
        design = terms[self.empty]
        solution: torch.Tensor = torch.linalg.solve(design.T @ design + ridge, design.T @ self.image[:, self.empty].T)
        return (terms @ solution).permute(2, 0, 1).clamp(0, 1)

    def _layer(self, index: int) -> list[torch.Tensor]:
        item, (x, y) = self.scene.objects[index], self.centres[index]
        shift_x, shift_y, turn, phase = self.poses[index]
        return [
            part[0]
            for part in draw.layer(
                torch.tensor([SHAPES.index(item.shape)]),
                PALETTE[COLOURS.index(item.colour)][None],
                torch.tensor([RADII[SIZES.index(item.size)]]),
                torch.tensor([float(item.fill == "striped")]),
                torch.tensor([phase]),
                (self.axis[None, :] - x - shift_x).expand(1, IMAGE_SIZE, IMAGE_SIZE),
                (self.axis[:, None] - y - shift_y).expand(1, IMAGE_SIZE, IMAGE_SIZE),
                torch.tensor([turn]),
            )
        ]

    def _surroundings(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The picture without this object and those in front of it, and a weight: 0 where those in front hide it."""
        under = self.backdrop
        for behind in reversed(range(index + 1, len(self.scene.objects))):
            light, cover, own = self._layer(behind)
            under = under * light * (1 - cover) + own * cover
        weight = torch.ones(IMAGE_SIZE, IMAGE_SIZE)
        for front in range(index):
            light, cover, _ = self._layer(front)
            weight = weight * ((cover < 0.05) & (light > 0.9))
        return under, weight

    def _crop(self, picture: torch.Tensor, left: int, top: int) -> torch.Tensor:
        padded = torch.nn.functional.pad(picture, (PAD, PAD, PAD, PAD))
        return padded[..., top : top + CROP, left : left + CROP].flatten(-2)

    def _match(self, index: int, expected_only: bool) -> tuple[int, int] | None:
        """The best (row, paint column) of the bank; None when nothing at all fits better."""
        (x, y), item = self.centres[index], self.scene.objects[index]
        left, top = math.floor(x), math.floor(y)
        bank = _bank(round(x - left, 3), round(y - top, 3))
        under, weight = self._surroundings(index)
        image, under, weight = (self._crop(part, left, top) for part in (self.image, under, weight))
        rows, columns = slice(None), torch.arange(len(bank.own))
        if expected_only:
            per_look = len(bank.looks) // (len(SHAPES) * len(SIZES))
            first = (SHAPES.index(item.shape) * len(SIZES) + SIZES.index(item.size)) * per_look
            rows = slice(first, first + per_look)
            colour, count = COLOURS.index(item.colour), len(COLOURS)
            striped = [colour + count * phase for phase in range(1, PHASES + 1)]
            columns = torch.tensor([colour] if item.fill == "plain" else striped)
        errors = _errors(bank, rows, columns, image, under, weight)
        best = int(errors.argmin())
        row, column = best // errors.shape[1], best % errors.shape[1]
        absent = (weight * (image - under).square()).sum()
        row, column = row + (rows.start or 0), int(columns[column])
        if expected_only:
            shift_x, shift_y, turn = bank.poses[row]
            # The bank's stripes are fixed to the nominal centre; a drawn object carries them along.
            moved = (shift_x + shift_y) / (math.sqrt(2) * draw.STRIPE_PERIOD)
            self.poses[index] = (shift_x, shift_y, turn, max(column // len(COLOURS) - 1, 0) / PHASES + moved)
        return None if float(absent) <= float(errors.min()) else (row, column)

    def verdict(self) -> Verdict:
        order = list(reversed(range(len(self.scene.objects))))
        for index in order + order:
            self._match(index, expected_only=True)
        objects: list[ObjectVerdict] = []
        for index, item in enumerate(self.scene.objects):
            match = self._match(index, expected_only=False)
            found = None
            if match is not None:
                x, y = self.centres[index]
                shape, size = _bank(round(x % 1, 3), round(y % 1, 3)).looks[match[0]]
                fill = "plain" if match[1] < len(COLOURS) else "striped"
                found = (SIZES[size], fill, COLOURS[match[1] % len(COLOURS)], SHAPES[shape])
            objects.append(ObjectVerdict(item, found))
        difference = (self.image - self.backdrop).abs().amax(0)
        stray = int(((difference > 0.25) & self.empty).sum())
        level = self.image[:, self.empty].median(dim=1).values
        background = BACKGROUNDS[int((BACKGROUND_PALETTE - level).square().sum(1).argmin())]
        return Verdict(self.scene, objects, background, stray)


def judge(images: torch.Tensor, scenes: Sequence[Scene]) -> list[Verdict]:
    """Verdicts on ``images`` (float [B, 3, 32, 32] in 0 to 1, else ValueError) as pictures of ``scenes``."""
    if images.shape != (len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images must be [{len(scenes)}, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {tuple(images.shape)}")
    pictures = images.float().cpu().clamp(0, 1)
    return [_Reading(image, scene).verdict() for image, scene in zip(pictures, scenes, strict=True)]


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Different held-out scenes, the same ones for the same seed."""
    rng = random.Random(f"check {seed}")
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes.setdefault(sample_scene(rng, "held_out"), None)
    return list(scenes)


def check_pipeline(pipeline: Any, prompts: int = 200, steps: int = 28, seed: int = 0, batch: int = 20) -> CheckResult:
    """Draws ``prompts`` held-out prompts with ``pipeline`` and judges the pictures."""
    scenes = held_out_scenes(prompts, seed)
    generator = torch.Generator().manual_seed(seed)
    verdicts, seconds = [], 0.0
    for start in range(0, prompts, batch):
        part = scenes[start : start + batch]
        began = time.perf_counter()
        images = pipeline(
            [describe(scene) for scene in part], num_inference_steps=steps, generator=generator, output_type="pt"
        ).images
        seconds += time.perf_counter() - began
        verdicts += judge(images, part)
    return CheckResult(verdicts, seconds)


def report(result: CheckResult) -> str:
    """A table: objects, pictures by number of objects and by kind, and what went wrong."""
    verdicts = result.verdicts
    objects = [item for verdict in verdicts for item in verdict.objects]

    def line(name: str, marks: Sequence[bool]) -> str:
        share = f"{100 * sum(marks) / len(marks):6.1f}%" if marks else "      -"
        return f"{name:<28}{sum(marks):>6} of {len(marks):<6}{share}"

    names = ("size", "fill", "colour", "shape")
    lines = [line("pictures", [verdict.right for verdict in verdicts])]
    for count in (1, 2, 3):
        marks = [verdict.right for verdict in verdicts if len(verdict.objects) == count]
        lines.append(line(f"  with {count} object{'s' * (count > 1)}", marks))
    overlapping = [verdict.right for verdict in verdicts if any(o.layer != "alone" for o in verdict.scene.objects)]
    lines.append(line("  with a stack", overlapping))
    lines.append(line("objects", [item.right for item in objects]))
    for index, name in enumerate(names):
        marks = [item.found is not None and item.found[index] == item.expected.appearance[index] for item in objects]
        lines.append(line(f"  {name}", marks))
    lines.append(line("backgrounds", [verdict.background == verdict.scene.background for verdict in verdicts]))
    lines.append(line("no stray pixels", [verdict.stray_pixels <= MAX_STRAY_PIXELS for verdict in verdicts]))
    for verdict in verdicts:
        if not verdict.right:
            lines.append(f"wrong: {describe(verdict.scene)}: {'; '.join(verdict.problems())}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cachedit.embedded.check", description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default=None, help="a saved pipeline; the shipped one by default")
    args = parser.parse_args(argv)
    from . import load_pipeline

    pipeline = load_pipeline(device=args.device, path=args.weights)
    pipeline.set_progress_bar_config(disable=True)
    result = check_pipeline(pipeline, args.prompts, args.steps, args.seed)
    print(f"{args.prompts} held-out prompts, {args.steps} steps, drawn in {result.seconds:.1f} s\n{report(result)}")
    return 0 if result.share >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
