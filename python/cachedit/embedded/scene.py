"""What a picture holds: the scene, its words, random scenes, and the split into training and held-out scenes.

A :class:`Scene` is one to three :class:`SceneObject` in front of a background. An object has a shape, a colour, a size,
a fill, a cell of a 3 x 3 grid (column and row, 0 to 2) and a layer. Cells are used once, except by a *stack*: two
objects of one cell, the one in front (layer "front") directly before the one behind it (layer "behind"). Objects are
listed from front to back: where two of them overlap, the one listed first covers the other.

Sentences about scenes, and the way back, are in :mod:`cachedit.embedded.prompt`; pictures in
:mod:`cachedit.embedded.draw`.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
FILLS = ("plain", "striped")
LAYERS = ("alone", "front", "behind")
BACKGROUNDS = ("gray", "black", "white", "navy")
MAX_OBJECTS = 3
HELD_OUT_BELOW = 0.1  # of the hash, which falls there for 24 of the 432 combinations


@dataclass(frozen=True)
class SceneObject:
    """One object; every field is checked.

    shape, colour, size, fill, layer: a word of SHAPES, COLOURS, SIZES, FILLS, LAYERS.
    column, row: 0 (left, top) to 2 (right, bottom).
    """

    shape: str
    colour: str
    size: str = "large"
    fill: str = "plain"
    column: int = 1
    row: int = 1
    layer: str = "alone"

    def __post_init__(self) -> None:
        for name, words in (
            ("shape", SHAPES),
            ("colour", COLOURS),
            ("size", SIZES),
            ("fill", FILLS),
            ("column", (0, 1, 2)),
            ("row", (0, 1, 2)),
            ("layer", LAYERS),
        ):
            value = getattr(self, name)
            if value not in words:
                raise ValueError(f"{name} must be one of {', '.join(map(str, words))}, got {value!r}")

    @property
    def appearance(self) -> tuple[str, str, str, str]:
        """(size, fill, colour, shape): what a noun phrase says."""
        return self.size, self.fill, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """One to three objects, front to back, on a background; ValueError when two of them share a cell unstacked."""

    objects: tuple[SceneObject, ...]
    background: str = "gray"

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} objects, got {len(self.objects)}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {self.background!r}")
        cells: set[tuple[int, int]] = set()
        index = 0
        while index < len(self.objects):
            first = self.objects[index]
            cell = (first.column, first.row)
            if cell in cells:
                raise ValueError(f"two objects at column {cell[0]}, row {cell[1]}; put one in front of the other")
            cells.add(cell)
            if first.layer == "alone":
                index += 1
                continue
            follower = [(item.column, item.row, item.layer) for item in self.objects[index + 1 : index + 2]]
            if first.layer != "front" or follower != [(*cell, "behind")]:
                raise ValueError("an object in front must be directly followed by the one behind it, in the same cell")
            index += 2


@functools.cache
def _combination_is_held_out(shape: str, colour: str, column: int, row: int) -> bool:
    digest = hashlib.sha256(f"{shape}/{colour}/{column}/{row}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_BELOW


def is_held_out(scene: Scene) -> bool:
    """True if some object's (shape, colour, column, row) is one of the 24 of 432 combinations, chosen by a hash, that
    training never draws."""
    return any(_combination_is_held_out(o.shape, o.colour, o.column, o.row) for o in scene.objects)


def _stack(front: SceneObject, behind: SceneObject, column: int, row: int) -> list[SceneObject]:
    return [
        replace(front, column=column, row=row, layer="front"),
        replace(behind, column=column, row=row, layer="behind"),
    ]


def _random_layout(rng: random.Random) -> list[SceneObject]:
    count = rng.choices((1, 2, 3), weights=(1, 3, 4))[0]
    looks = [
        SceneObject(
            shape=rng.choice(SHAPES),
            colour=rng.choice(COLOURS),
            size=rng.choice(SIZES),
            fill=rng.choices(FILLS, weights=(3, 2))[0],
        )
        for _ in range(count)
    ]
    if count > 1 and rng.random() < 0.2:  # a counted pair (or three) of the same thing
        looks[1] = looks[0]
        if count == 3 and rng.random() < 0.3:
            looks[2] = looks[0]
    if count > 1 and rng.random() < 0.4:  # a stack, and perhaps a third object well away from it
        looks[1] = replace(looks[1], colour=rng.choice([colour for colour in COLOURS if colour != looks[0].colour]))
        if count == 2:
            return _stack(looks[0], looks[1], rng.randrange(3), rng.randrange(3))
        upright = rng.random() < 0.5
        near, far, across_near, across_far = rng.choice((0, 2)), 0, rng.choice((0, 1, 1, 2)), rng.choice((0, 1, 1, 2))
        far = 2 - near
        here, there = ((across_near, near), (across_far, far)) if upright else ((near, across_near), (far, across_far))
        stack, single = _stack(looks[0], looks[1], *here), replace(looks[2], column=there[0], row=there[1])
        return [*stack, single] if near == 0 else [single, *stack]
    kind = rng.random()
    if kind < 0.35 or count == 1:  # anywhere
        cells = rng.sample([(column, row) for row in range(3) for column in range(3)], count)
    elif kind < 0.6 and count == 3:  # three in a row: the middle one is named first ("between"), or left to right
        cells = [(1, 1), (0, 1), (2, 1)] if looks[0] != looks[1] else [(0, 1), (1, 1), (2, 1)]
    else:  # a relation
        first, second = rng.choice((((0, 2), (1,)), ((1,), (0, 2))))
        if count == 2:
            first, second = (1,), (1,)
        side = [(across, 0) for across in first] + [(across, 2) for across in second]
        cells = side if rng.random() < 0.5 else [(along, across) for across, along in side]
    return [replace(look, column=column, row=row) for look, (column, row) in zip(looks, cells, strict=True)]


def sample_scene(rng: random.Random, split: str = "train") -> Scene:
    """A random scene of ``split``: "train" (nothing held out), "held_out" (something held out in it) or "any"."""
    if split not in ("train", "held_out", "any"):
        raise ValueError(f"split must be train, held_out or any, got {split!r}")
    while True:
        background = rng.choices(BACKGROUNDS, weights=(2, 1, 1, 1))[0]
        scene = Scene(tuple(_random_layout(rng)), background)
        if split == "any" or is_held_out(scene) == (split == "held_out"):
            return scene
