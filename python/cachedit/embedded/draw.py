"""Draws scenes as 32 x 32 pictures: signed distances, anti-aliased, a whole batch at once.

Nothing but the scene's words is fixed: each object is moved by up to 0.8 pixels, scaled by up to 5%, turned by up to 8
degrees, and its stripes start anywhere; the background carries a soft gradient and a ripple. A model has to take all of
that from its noise. Every object throws a soft shadow and is lit from the top left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .scene import BACKGROUNDS, COLOURS, FILLS, MAX_OBJECTS, SHAPES, SIZES, Scene

IMAGE_SIZE = 32
RADII = (4.1, 6.1)  # pixels; small, large
STRIPE_PERIOD = 3.8  # pixels
SHADOW, SHADOW_OFFSET = 0.45, 1.2  # darkening; pixels to the right and down
PALETTE = torch.tensor(
    [
        (0.90, 0.12, 0.12),
        (1.00, 0.55, 0.05),
        (0.98, 0.90, 0.15),
        (0.15, 0.70, 0.20),
        (0.15, 0.85, 0.90),
        (0.15, 0.28, 0.95),
        (0.55, 0.15, 0.80),
        (1.00, 0.50, 0.75),
    ]
)
BACKGROUND_PALETTE = torch.tensor([(0.45, 0.45, 0.45), (0.10, 0.10, 0.10), (0.80, 0.80, 0.80), (0.10, 0.13, 0.34)])
MAX_SHIFT, MAX_SCALE, MAX_TURN = 0.8, 0.05, math.radians(8)
ALONE_SPACING, STACK_SPACING, STACK_OFFSET = 9.3, 7.0, 2.8  # pixels


@dataclass
class SceneTensors:
    """A batch of scenes as numbers: shape, colour, size, fill int64 [B, 3] (indices into the words, 0 where there is no
    object), present bool [B, 3], centres float32 [B, 3, 2] (x, y in pixels), background int64 [B]."""

    shape: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    fill: torch.Tensor
    present: torch.Tensor
    centres: torch.Tensor
    background: torch.Tensor


@dataclass
class Variation:
    """What the words leave open, per batch entry (B) and object (3), float32.

    shift [B, 3, 2] pixels, scale [B, 3] around 1, turn [B, 3] radians, phase [B, 3] in stripes, backdrop [B, 7]:
    gradient x and y (brightness over the picture), ripple amplitude, wave vector x and y (radians a pixel), ripple
    phase (radians), brightness.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    turn: torch.Tensor
    phase: torch.Tensor
    backdrop: torch.Tensor


def object_centre(column: int, row: int, layer: str) -> tuple[float, float]:
    """Where an object of this cell and layer sits before it is moved: x, y in pixels, 0 to 32."""
    if layer == "alone":
        return 16 + (column - 1) * ALONE_SPACING, 16 + (row - 1) * ALONE_SPACING
    sign = 1 if layer == "behind" else -1
    return 16 + (column - 1) * STACK_SPACING + sign * STACK_OFFSET, 16 + (row - 1) * STACK_SPACING - sign * STACK_OFFSET


def scene_tensors(scenes: Sequence[Scene]) -> SceneTensors:
    """Numbers for :func:`draw_tensors`."""
    looks, centres = [], []
    for scene in scenes:
        row_looks, row_centres = [], []
        for item in scene.objects:
            row_looks.append(
                (
                    SHAPES.index(item.shape),
                    COLOURS.index(item.colour),
                    SIZES.index(item.size),
                    FILLS.index(item.fill),
                    1,
                )
            )
            row_centres.append(object_centre(item.column, item.row, item.layer))
        missing = MAX_OBJECTS - len(scene.objects)
        looks.append(row_looks + [(0, 0, 0, 0, 0)] * missing)
        centres.append(row_centres + [(16.0, 16.0)] * missing)
    codes = torch.tensor(looks, dtype=torch.int64)
    shape, colour, size, fill, present = codes.unbind(-1)
    background = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes], dtype=torch.int64)
    return SceneTensors(shape, colour, size, fill, present.bool(), torch.tensor(centres), background)


def random_variation(batch: int, generator: torch.Generator | None = None) -> Variation:
    """Everything that the words leave open, drawn at random."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def signed(*shape: int) -> torch.Tensor:
        return uniform(*shape) * 2 - 1

    angle, wave_angle = uniform(batch) * 2 * math.pi, uniform(batch) * 2 * math.pi
    steepness, wave = 0.05 + 0.12 * uniform(batch), 2 * math.pi / (9 + 8 * uniform(batch))
    backdrop = torch.stack(
        [
            steepness * angle.cos(),
            steepness * angle.sin(),
            0.02 + 0.04 * uniform(batch),
            wave * wave_angle.cos(),
            wave * wave_angle.sin(),
            uniform(batch) * 2 * math.pi,
            0.03 * signed(batch),
        ],
        dim=1,
    )
    return Variation(
        shift=MAX_SHIFT * signed(batch, MAX_OBJECTS, 2),
        scale=1 + MAX_SCALE * signed(batch, MAX_OBJECTS),
        turn=MAX_TURN * signed(batch, MAX_OBJECTS),
        phase=uniform(batch, MAX_OBJECTS),
        backdrop=backdrop,
    )


def no_variation(batch: int) -> Variation:
    """The clean picture: nothing moved, scaled or turned, an even background."""
    return Variation(
        shift=torch.zeros(batch, MAX_OBJECTS, 2),
        scale=torch.ones(batch, MAX_OBJECTS),
        turn=torch.zeros(batch, MAX_OBJECTS),
        phase=torch.zeros(batch, MAX_OBJECTS),
        backdrop=torch.zeros(batch, 7),
    )


def signed_distance(shape: torch.Tensor, u: torch.Tensor, v: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance in pixels to the outline, negative inside.

    shape int64 [M]; u, v float [M, ...] pixels right of and below the centre; radius float [M]. Returns [M, ...].
    """
    out = torch.empty_like(u)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        x, y = u[rows], v[rows]
        r = radius[rows].view(-1, *([1] * (u.dim() - 1)))
        if name == "circle":
            d = torch.hypot(x, y) - r
        elif name == "square":
            d = torch.maximum(x.abs(), y.abs()) - 0.88 * r
        elif name == "triangle":
            d = torch.maximum(y - 0.78 * r, (x.abs() * 1.88 - (y + 1.1 * r)) / math.hypot(1.88, 1.0))
        elif name == "diamond":
            d = (x.abs() + y.abs() - 1.18 * r) / math.sqrt(2)
        elif name == "cross":
            x, y = x.abs(), y.abs()
            d = torch.maximum(torch.maximum(x, y) - 1.05 * r, torch.minimum(x, y) - 0.36 * r)
        else:
            d = (torch.hypot(x, y) - 0.76 * r).abs() - 0.27 * r
        out[rows] = d
    return out


def stripes(u: torch.Tensor, v: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """How light the stripes are, 0 to 1, at pixel offsets u, v [M, ...] from the centre; phase [M]."""
    along = (u + v) / (math.sqrt(2) * STRIPE_PERIOD) + phase.view(-1, *([1] * (u.dim() - 1)))
    return (0.5 + 1.4 * torch.sin(2 * math.pi * along)).clamp(0, 1)


def paint(
    colour: torch.Tensor, light: torch.Tensor, u: torch.Tensor, v: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """An object's own RGB [M, 3, ...]: colour [M, 3], light (stripes) [M, ...], lit from the top left."""
    extra = [1] * (u.dim() - 1)
    base = colour.view(-1, 3, *extra)
    mixed = base + 0.75 * light.unsqueeze(1) * (1 - base)
    shade = 1 - 0.12 * ((u + v) / radius.view(-1, *extra)).clamp(-1.6, 1.6)
    return (mixed * shade.unsqueeze(1)).clamp(0, 1)


def backdrop(background: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The empty picture, float32 [B, 3, 32, 32]."""
    axis = torch.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    y, x = axis[:, None], axis[None, :]
    gx, gy, amplitude, kx, ky, phase, level = (values[:, i, None, None] for i in range(7))
    light = (gx * x + gy * y) / (IMAGE_SIZE / 2) + amplitude * torch.sin(kx * x + ky * y + phase) + level
    return (BACKGROUND_PALETTE[background][:, :, None, None] + light[:, None]).clamp(0, 1)


def layer(
    shape: torch.Tensor,
    colour: torch.Tensor,
    radius: torch.Tensor,
    striped: torch.Tensor,
    phase: torch.Tensor,
    dx: torch.Tensor,
    dy: torch.Tensor,
    turn: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One object each: what it leaves of the light below it [M, ...], its cover [M, ...] and its own RGB [M, 3, ...].

    shape int64 [M], colour [M, 3], radius, striped (0 or 1), phase, turn float [M]; dx, dy [M, ...] pixels from the
    centre. The picture below becomes ``below * light * (1 - cover) + own * cover``.
    """
    extra = [1] * (dx.dim() - 1)
    cos, sin = turn.cos().view(-1, *extra), turn.sin().view(-1, *extra)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    cast = signed_distance(shape, u - SHADOW_OFFSET, v - SHADOW_OFFSET, radius)
    light = 1 - SHADOW * (0.5 - cast / 2.5).clamp(0, 1)
    cover = (0.5 - signed_distance(shape, u, v, radius)).clamp(0, 1)
    bands = stripes(u, v, phase) * striped.view(-1, *extra)
    return light, cover, paint(colour, bands, u, v, radius)


def draw_tensors(scenes: SceneTensors, variation: Variation) -> torch.Tensor:
    """Pictures float32 [B, 3, 32, 32] in 0 to 1; objects are painted from the last to the first."""
    canvas = backdrop(scenes.background, variation.backdrop)
    axis = torch.arange(IMAGE_SIZE) + 0.5
    for slot in reversed(range(MAX_OBJECTS)):
        rows = scenes.present[:, slot].nonzero()[:, 0]
        if len(rows) == 0:
            continue
        centre = scenes.centres[rows, slot] + variation.shift[rows, slot]
        light, cover, own = layer(
            scenes.shape[rows, slot],
            PALETTE[scenes.colour[rows, slot]],
            torch.tensor(RADII)[scenes.size[rows, slot]] * variation.scale[rows, slot],
            (scenes.fill[rows, slot] == FILLS.index("striped")).float(),
            variation.phase[rows, slot],
            (axis[None, None, :] - centre[:, 0, None, None]).expand(-1, IMAGE_SIZE, -1),
            (axis[None, :, None] - centre[:, 1, None, None]).expand(-1, -1, IMAGE_SIZE),
            variation.turn[rows, slot],
        )
        light, cover = light[:, None], cover[:, None]
        canvas[rows] = canvas[rows] * light * (1 - cover) + own * cover
    return canvas


def draw_scenes(scenes: Sequence[Scene], generator: torch.Generator | None = None, clean: bool = False) -> torch.Tensor:
    """Pictures of ``scenes``, float32 [B, 3, 32, 32] in 0 to 1, varied at random unless ``clean``."""
    variation = no_variation(len(scenes)) if clean else random_variation(len(scenes), generator)
    return draw_tensors(scene_tensors(scenes), variation)
