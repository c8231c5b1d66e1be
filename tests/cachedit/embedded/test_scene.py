"""Scenes: their rules, random ones, and the split."""

import random

import pytest

from cachedit.embedded.scene import COLOURS, SHAPES, Scene, SceneObject, is_held_out, sample_scene


def test_fields_are_checked():
    with pytest.raises(ValueError, match=r"shape must be one of circle, .*, got 'star'"):
        SceneObject("star", "red")
    with pytest.raises(ValueError, match="column must be one of 0, 1, 2, got 3"):
        SceneObject("circle", "red", column=3)
    with pytest.raises(ValueError, match="background must be one of"):
        Scene((SceneObject("circle", "red"),), "green")


def test_objects_share_a_cell_only_in_a_stack():
    red, blue = SceneObject("circle", "red"), SceneObject("ring", "blue")
    with pytest.raises(ValueError, match="two objects at column 1, row 1"):
        Scene((red, blue))
    front = SceneObject("circle", "red", layer="front")
    behind = SceneObject("ring", "blue", layer="behind")
    assert Scene((front, behind)).objects == (front, behind)
    for wrong in (
        (behind, front),
        (front,),
        (front, blue),
        (front, SceneObject("ring", "blue", row=0, layer="behind")),
    ):
        with pytest.raises(ValueError, match="an object in front must be directly followed"):
            Scene(wrong)
    with pytest.raises(ValueError, match="two objects at"):
        Scene((front, behind, red))


@pytest.mark.parametrize("count", [0, 4])
def test_one_to_three_objects(count):
    objects = tuple(SceneObject("circle", "red", column=index % 3, row=index // 3) for index in range(count))
    with pytest.raises(ValueError, match=f"1 to 3 objects, got {count}"):
        Scene(objects)


def test_same_generator_same_scenes():
    first, second = random.Random(3), random.Random(3)
    assert [sample_scene(first) for _ in range(20)] == [sample_scene(second) for _ in range(20)]


def test_the_split_keeps_some_combinations_out():
    combinations = [
        Scene((SceneObject(shape, colour, column=column, row=row),))
        for shape in SHAPES
        for colour in COLOURS
        for column in range(3)
        for row in range(3)
    ]
    assert (sum(map(is_held_out, combinations)), len(combinations)) == (24, 432)
    for look in ({"size": "small"}, {"fill": "striped"}):  # neither size nor fill decides
        for scene in combinations[:40]:
            item = scene.objects[0]
            same = SceneObject(item.shape, item.colour, column=item.column, row=item.row, **look)
            assert is_held_out(Scene((same,))) == is_held_out(scene)


def test_training_draws_nothing_that_is_held_out():
    rng = random.Random(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(500))
    assert all(is_held_out(sample_scene(rng, "held_out")) for _ in range(100))
    with pytest.raises(ValueError, match="split must be"):
        sample_scene(rng, "test")


def test_every_kind_of_scene_is_sampled():
    rng = random.Random(0)
    scenes = [sample_scene(rng, "any") for _ in range(500)]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    objects = [item for scene in scenes for item in scene.objects]
    assert {item.layer for item in objects} == {"alone", "front", "behind"}
    assert {(item.column, item.row) for item in objects} == {(c, r) for c in range(3) for r in range(3)}
