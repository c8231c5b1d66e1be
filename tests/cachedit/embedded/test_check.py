"""The checker itself: right pictures pass, wrong ones fail, and it says why."""

import random
from dataclasses import replace

import pytest
import torch

from cachedit.embedded.check import CheckResult, held_out_scenes, judge, report
from cachedit.embedded.draw import draw_scenes
from cachedit.embedded.prompt import parse_prompt
from cachedit.embedded.scene import BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES, Scene, is_held_out, sample_scene

WORDS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "fill": FILLS}


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(7)
    scenes = [sample_scene(rng, "any") for _ in range(150)]
    return scenes, draw_scenes(scenes, torch.Generator().manual_seed(7))


def test_varied_drawings_pass(drawn):
    scenes, images = drawn
    verdicts = judge(images, scenes)
    assert CheckResult(verdicts, 0.0).share >= 0.99, report(CheckResult(verdicts, 0.0))


def test_slightly_noisy_drawings_pass(drawn):
    scenes, images = drawn
    noisy = images[:40] + 0.03 * torch.randn(images[:40].shape, generator=torch.Generator().manual_seed(0))
    assert CheckResult(judge(noisy, scenes[:40]), 0.0).share >= 0.97


def test_pictures_of_other_scenes_fail(drawn):
    scenes, images = drawn
    assert not any(verdict.right for verdict in judge(images[:40].roll(1, 0), scenes[:40]))


@pytest.mark.parametrize("field", WORDS)
def test_one_wrong_word_is_found_and_named(drawn, field):
    rng, scenes = random.Random(field), drawn[0][:30]
    wrong = []
    for scene in scenes:
        objects = list(scene.objects)
        index = rng.randrange(len(objects))
        other = rng.choice([word for word in WORDS[field] if word != getattr(objects[index], field)])
        objects[index] = replace(objects[index], **{field: other})
        wrong.append(Scene(tuple(objects), scene.background))
    verdicts = judge(draw_scenes(wrong, torch.Generator().manual_seed(1)), scenes)
    assert sum(verdict.right for verdict in verdicts) == 0
    assert all(verdict.problems() for verdict in verdicts)


def test_a_missing_an_extra_and_a_misplaced_object_fail():
    asked = parse_prompt("a red circle left of a blue square")
    for shown in ("a red circle at the left", "a red circle above a blue square", "a blue square left of a red circle"):
        assert not judge(draw_scenes([parse_prompt(shown)]), [asked])[0].right
    extra = "a red circle at the left, a blue square at the right and a small green ring at the top"
    verdict = judge(draw_scenes([parse_prompt(extra)], torch.Generator().manual_seed(1)), [asked])[0]
    assert not verdict.right and "stray pixels" in verdict.problems()[-1]
    swapped = judge(
        draw_scenes([parse_prompt("a red circle behind a blue square")]),
        [parse_prompt("a red circle in front of a blue square")],
    )
    assert not swapped[0].right


def test_a_wrong_background_fails(drawn):
    scenes = drawn[0][:30]
    other = [
        Scene(scene.objects, BACKGROUNDS[(BACKGROUNDS.index(scene.background) + 1) % len(BACKGROUNDS)])
        for scene in scenes
    ]
    verdicts = judge(draw_scenes(other, torch.Generator().manual_seed(1)), scenes)
    assert not any(verdict.right for verdict in verdicts)


def test_nothing_passes_on_an_empty_or_noisy_picture(drawn):
    scenes = drawn[0][:20]
    noise = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not any(verdict.right for verdict in judge(noise, scenes))
    empty = torch.full((20, 3, 32, 32), 0.45)
    assert not any(verdict.right for verdict in judge(empty, scenes))
    assert judge(empty[:1], [parse_prompt("a small red circle")])[0].objects[0].found is None


def test_held_out_scenes_are_different_held_out_and_stable():
    scenes = held_out_scenes(200)
    assert len(set(scenes)) == 200 and all(map(is_held_out, scenes))
    assert scenes == held_out_scenes(200) and held_out_scenes(50) == scenes[:50]


def test_images_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[1, 3, 32, 32\], got \(1, 3, 16, 16\)"):
        judge(torch.zeros(1, 3, 16, 16), [parse_prompt("a red circle")])
