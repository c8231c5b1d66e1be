"""The text code: fixed, nothing to train.

Each object's phrase becomes one token: one-hot words side by side (shape, colour, size, fill, column, row, cell,
layer) and the slot, so that the order of the objects, which says who covers whom, is known. A last token carries the
background. Empty slots hold a padding token. The pooled vector is the three phrases and the background, one after
another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .scene import BACKGROUNDS, COLOURS, FILLS, LAYERS, MAX_OBJECTS, SHAPES, SIZES, Scene, SceneObject

TOKENS = MAX_OBJECTS + 1
TOKEN_DIM = 48
POOLED_DIM = 96
_KINDS = ("object", "background", "padding")
_GROUPS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "fill": len(FILLS),
    "cell": 9,
    "layer": len(LAYERS),
    "column": 3,
    "row": 3,
    "slot": MAX_OBJECTS,
    "background": len(BACKGROUNDS),
    "kind": len(_KINDS),
}
_POOLED_PART = sum(_GROUPS[name] for name in ("shape", "colour", "size", "fill", "cell", "layer"))


def _offsets() -> dict[str, int]:
    offsets, position = {}, 0
    for name, width in _GROUPS.items():
        offsets[name] = position
        position += width
    assert position <= TOKEN_DIM and MAX_OBJECTS * _POOLED_PART + len(BACKGROUNDS) <= POOLED_DIM
    return offsets


_OFFSETS = _offsets()


def _object_positions(item: SceneObject) -> list[int]:
    """Which entries of the token are one; the first six also stand in the pooled vector."""
    values = {
        "shape": SHAPES.index(item.shape),
        "colour": COLOURS.index(item.colour),
        "size": SIZES.index(item.size),
        "fill": FILLS.index(item.fill),
        "cell": 3 * item.row + item.column,
        "layer": LAYERS.index(item.layer),
        "column": item.column,
        "row": item.row,
    }
    return [_OFFSETS[name] + value for name, value in values.items()]


def encode_scenes(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens float32 [B, 4, 48] and pooled vector float32 [B, 96], zeros and ones."""
    tokens = torch.zeros(len(scenes), TOKENS, TOKEN_DIM)
    pooled = torch.zeros(len(scenes), POOLED_DIM)
    for index, scene in enumerate(scenes):
        for slot in range(MAX_OBJECTS):
            tokens[index, slot, _OFFSETS["slot"] + slot] = 1
            if slot >= len(scene.objects):
                tokens[index, slot, _OFFSETS["kind"] + _KINDS.index("padding")] = 1
                continue
            positions = _object_positions(scene.objects[slot])
            tokens[index, slot, [*positions, _OFFSETS["kind"]]] = 1
            pooled[index, [slot * _POOLED_PART + position for position in positions[:6]]] = 1
        background = BACKGROUNDS.index(scene.background)
        tokens[index, -1, [_OFFSETS["background"] + background, _OFFSETS["kind"] + 1]] = 1
        pooled[index, MAX_OBJECTS * _POOLED_PART + background] = 1
    return tokens, pooled


def text_ids() -> torch.Tensor:
    """Position ids of the text tokens, float32 [4, 3]: the slot counts on the first axis, from 1."""
    ids = torch.zeros(TOKENS, 3)
    ids[:, 0] = torch.arange(1, TOKENS + 1)
    return ids
