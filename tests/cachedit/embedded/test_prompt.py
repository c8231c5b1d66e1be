"""The grammar: every scene has a sentence that means it, and what is no sentence is refused with help."""

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedit.embedded.prompt import PromptError, describe, parse_prompt
from cachedit.embedded.scene import BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES, Scene, SceneObject, sample_scene

CELLS = [(column, row) for column in range(3) for row in range(3)]


@st.composite
def scenes(draw):
    """Any scene at all, also those that training never draws."""

    def item(cell, layer):
        words = [draw(st.sampled_from(group)) for group in (SHAPES, COLOURS, SIZES, FILLS)]
        return SceneObject(*words, *cell, layer)

    cells = iter(draw(st.lists(st.sampled_from(CELLS), min_size=3, max_size=3, unique=True)))
    objects, count = [], draw(st.integers(1, 3))
    while len(objects) < count:
        cell = next(cells)
        if count - len(objects) > 1 and draw(st.booleans()):
            objects += [item(cell, "front"), item(cell, "behind")]
        else:
            objects.append(item(cell, "alone"))
    return Scene(tuple(objects), draw(st.sampled_from(BACKGROUNDS)))


@given(scenes())
@settings(max_examples=300, deadline=None)
def test_describe_and_parse_are_inverse(scene):
    assert parse_prompt(describe(scene)) == scene


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_sampled_scenes_round_trip(seed):
    scene = sample_scene(random.Random(seed), "any")
    assert parse_prompt(describe(scene)) == scene


@given(st.text(alphabet=st.sampled_from("abcdeghilnorstuw ,.-!1"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_scene_or_a_prompt_error(text):
    with contextlib.suppress(PromptError):
        parse_prompt(text)


WORDS = ["a", "two", "three", "red", "blue", "small", "striped", "circle", "rings", "cross", "left", "of", "above"]
WORDS += ["in", "front", "behind", "between", "and", ",", "at", "the", "top", "on", "black", "background", "to"]


@given(st.lists(st.sampled_from(WORDS), max_size=12))
@settings(max_examples=500, deadline=None)
def test_any_words_give_a_scene_or_a_prompt_error(words):
    try:
        scene = parse_prompt(" ".join(words))
    except PromptError:
        return
    assert parse_prompt(describe(scene)) == scene


def test_relations():
    scene = parse_prompt("a red circle left of a blue square")
    assert scene == Scene((SceneObject("circle", "red", column=0), SceneObject("square", "blue", column=2)))
    assert parse_prompt("a blue square right of a red circle") == scene
    assert parse_prompt("a blue square to the right of a red circle") == scene
    above = parse_prompt("two small green triangles above a large yellow ring")
    assert [(item.column, item.row) for item in above.objects] == [(0, 0), (2, 0), (1, 2)]
    assert parse_prompt("a yellow ring below two small green triangles") == above
    assert parse_prompt("a yellow ring under two little green triangles.") == above


def test_stacks():
    scene = parse_prompt("a striped blue square in front of a red circle")
    assert [item.layer for item in scene.objects] == ["front", "behind"]
    assert scene.objects[0].fill == "striped" and scene.objects[0].colour == "blue"
    assert parse_prompt("a red circle behind a striped blue square") == scene
    corner = parse_prompt("a pink ring in front of a red circle in the top left corner on a navy background")
    assert {(item.column, item.row) for item in corner.objects} == {(0, 0)} and corner.background == "navy"


def test_places_lists_and_counts():
    scene = parse_prompt("A red circle at the top-left, a blue ring in the middle and a pink cross on the right")
    assert [(item.column, item.row) for item in scene.objects] == [(0, 0), (1, 1), (2, 1)]
    row = parse_prompt("a red circle, a blue ring, and a pink cross")
    assert [(item.column, item.row) for item in row.objects] == [(0, 1), (1, 1), (2, 1)]
    three = parse_prompt("three red circles on a grey background")
    assert [item.column for item in three.objects] == [0, 1, 2] and three.background == "gray"
    between = parse_prompt("a red circle between a blue ring and a pink cross")
    assert [(item.colour, item.column) for item in between.objects] == [("red", 1), ("blue", 0), ("pink", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the prompt is empty"),
        ("a red star", "'star' is not a word I know: expected a shape: .*circle, square, triangle"),
        ("a purpel ring", "'purpel' is not a word I know.*did you mean 'purple'"),
        ("a red trangle", "did you mean 'triangle'"),
        ("a circle", "'circle' needs a colour: red, orange"),
        ("red circles", "say how many 'circles'"),
        ("a red blue circle", "two words for the colour: 'red' and 'blue'"),
        ("a red circle left of", "the prompt ends where a colour and a shape should follow"),
        ("a red circle a blue ring", "'a' is out of place: expected a relation, a place or the end"),
        ("a red circle next to a ring", "'next' is not a word I know.*left of, right of, above, below"),
        ("a red circle at the red", "'red' is out of place: expected a place: top, bottom"),
        ("a red circle at the top bottom", "'top bottom' is not a place"),
        ("two red circles at the top", "a counted group takes no place"),
        ("three red rings left of a blue cross", "at most 3 objects, got 4"),
        ("a red ring, a red ring, a red ring, a red ring", "at most 3 objects, got 4"),
        ("a red ring at the top and a blue ring", "say where 'a blue ring' is"),
        ("a red ring at the top and a blue ring at the top", "two objects at column 1, row 0"),
        ("a red ring on a green background", "expected a background colour: gray, black, white, navy"),
        ("on a black background", "there is nothing on the background"),
        ("a red ring a black background", 'expected "on" before the background'),
        ("two red rings in front of a blue cross", "only single objects stand in front"),
        ("a red ring between two blue crosses", "only one cross can stand there, not 2"),
        ("a red ring!", "'!' has no meaning"),
    ],
)
def test_errors_name_the_word_and_what_would_fit(text, message):
    with pytest.raises(PromptError, match=message) as error:
        parse_prompt(text)
    assert isinstance(error.value, ValueError)


def test_a_prompt_is_a_string():
    with pytest.raises(TypeError, match="a prompt is a string, got list"):
        parse_prompt(["a red circle"])
