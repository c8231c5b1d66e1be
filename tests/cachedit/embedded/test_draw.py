"""Pictures: range, repeatability, places, order, and what varies."""

import random

import pytest
import torch

from cachedit.embedded.draw import (
    IMAGE_SIZE,
    PALETTE,
    RADII,
    draw_scenes,
    draw_tensors,
    no_variation,
    object_centre,
    scene_tensors,
    signed_distance,
)
from cachedit.embedded.prompt import parse_prompt
from cachedit.embedded.scene import COLOURS, SHAPES, Scene, SceneObject, sample_scene


def scenes(count, seed=0):
    rng = random.Random(seed)
    return [sample_scene(rng, "any") for _ in range(count)]


def nearest_colour(pixel):
    return COLOURS[int((PALETTE - pixel).square().sum(1).argmin())]


def test_shape_dtype_and_range():
    images = draw_scenes(scenes(50), torch.Generator().manual_seed(0))
    assert images.shape == (50, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1


def test_one_seed_one_picture_and_two_seeds_two():
    some = scenes(10)
    first, again, other = (draw_scenes(some, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert ((first - other).abs().amax((1, 2, 3)) > 0.02).all()


def test_a_batch_equals_its_pictures():
    some = scenes(20)
    together = draw_scenes(some, clean=True)
    alone = torch.cat([draw_scenes([scene], clean=True) for scene in some])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("column,row", [(0, 0), (1, 1), (2, 0), (1, 2)])
def test_an_object_is_where_and_what_it_should_be(colour, column, row):
    image = draw_scenes([Scene((SceneObject("circle", colour, column=column, row=row),))], clean=True)[0]
    x, y = object_centre(column, row, "alone")
    assert nearest_colour(image[:, int(y), int(x)]) == colour
    opposite = image[:, IMAGE_SIZE - 1 - int(y), IMAGE_SIZE - 1 - int(x)]
    if (column, row) != (1, 1):
        assert torch.allclose(opposite, torch.full((3,), 0.45), atol=1e-4)


def test_the_object_in_front_covers_the_other():
    front_red = draw_scenes([parse_prompt("a red square in front of a blue square")], clean=True)[0]
    front_blue = draw_scenes([parse_prompt("a red square behind a blue square")], clean=True)[0]
    assert nearest_colour(front_red[:, 16, 16]) == "red"
    assert nearest_colour(front_blue[:, 16, 16]) == "blue"


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_distances_have_slope_one_near_the_outline_and_the_right_sign(index):
    axis = torch.linspace(-10, 10, 401)
    u, v = torch.meshgrid(axis, axis, indexing="xy")
    d = signed_distance(torch.tensor([index]), u[None], v[None], torch.tensor([RADII[1]]))[0]
    assert d[0, 0] > 0
    assert (d[200, 200] > 0) == (SHAPES[index] == "ring")
    area = (d < 0).float().mean() * 400
    assert 45 < area < 130
    step = torch.hypot(*torch.gradient(d, spacing=0.05))
    assert 0.95 < step[(d.abs() < 0.5)].median() < 1.05


def test_all_looks_are_told_apart():
    looks = [
        Scene((SceneObject(shape, "red", size, fill),))
        for shape in SHAPES
        for size in ("small", "large")
        for fill in ("plain", "striped")
    ]
    images = draw_scenes(looks, clean=True).flatten(1)
    distances = torch.cdist(images, images) + 100 * torch.eye(len(looks))
    assert distances.min() > 1.0


def test_clean_pictures_have_an_even_background():
    image = draw_tensors(scene_tensors([parse_prompt("a small red circle")]), no_variation(1))[0]
    assert torch.allclose(image[:, :6].flatten(1).std(1), torch.zeros(3), atol=1e-6)
