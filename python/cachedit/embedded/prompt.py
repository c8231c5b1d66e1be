"""Prompts: sentences about scenes, read and written.

The grammar, in lower or upper case, with or without commas and a full stop::

    prompt     = picture [ "on a" background "background" ]
    picture    = group                                        in the centre; a counted group in a row
               | group place                                  "a red circle at the top left"
               | group relation group                         "two small green triangles above a large yellow ring"
               | phrase "between" phrase "and" phrase         three in a row, the first one in the middle
               | item { ("," | "and") item }                  each with its place; or none with one: left to right
    item       = group place | phrase
    group      = phrase | count phrase | phrase ("in front of" | "behind") phrase
    phrase     = "a" { size | fill | colour } shape           the colour must be there
    relation   = "left of" | "right of" | "above" | "below"
    place      = "at the" ( "top left" | "top" | "top right" | "left" | "centre" | "right" | "bottom left" | ... )
    count      = "two" | "three"
    size       = "small" | "large"                            large unless said otherwise
    fill       = "plain" | "striped"                          plain unless said otherwise
    colour     = "red" | "orange" | "yellow" | "green" | "cyan" | "blue" | "purple" | "pink"
    shape      = "circle" | "square" | "triangle" | "diamond" | "cross" | "ring", and plurals
    background = "gray" | "black" | "white" | "navy"          gray unless said otherwise

A picture holds one to three objects. Where two overlap, the one mentioned first is in front, unless "behind" says
otherwise. Of the groups in a relation, each stands in the middle of its side; a counted pair spreads over that side.
Common synonyms are understood: big, little, solid, stripy, grey, disc, plus, center, middle, under, "to the left of".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .scene import BACKGROUNDS, COLOURS, FILLS, MAX_OBJECTS, SHAPES, SIZES, Scene, SceneObject

_COUNTS = {"a": 1, "an": 1, "one": 1, "the": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}
_SYNONYMS = {
    "big": "large",
    "little": "small",
    "tiny": "small",
    "solid": "plain",
    "stripy": "striped",
    "stripey": "striped",
    "grey": "gray",
    "disc": "circle",
    "disk": "circle",
    "plus": "cross",
    "center": "centre",
    "middle": "centre",
    "under": "below",
    "beneath": "below",
    "colored": "coloured",
}
_PLURALS = {("crosses" if shape == "cross" else shape + "s"): shape for shape in SHAPES} | {
    "discs": "circle",
    "disks": "circle",
    "pluses": "cross",
}
_COLUMNS = {"left": 0, "centre": 1, "right": 2}
_ROWS = {"top": 0, "centre": 1, "bottom": 2}
_PLACE_WORDS = ("top", "bottom", "left", "right", "centre")
_RELATIONS = ("left of", "right of", "above", "below")
_LINKS = ("in front of", "behind", "between", "and")
_JOINTS = ("background", "of", "above", "below", "in", "front", "behind", "between", "and", "at", "on", "to", "corner")
_ALL_WORDS = (*SHAPES, *_PLURALS, *COLOURS, *SIZES, *FILLS, *BACKGROUNDS, *_PLACE_WORDS, *_COUNTS, *_SYNONYMS, *_JOINTS)


class PromptError(ValueError):
    """A sentence that the grammar does not cover; the message names the word and what would fit there."""


@dataclass
class _Group:
    """Objects that are placed together: ``kind`` is "single", "count" or "stack"."""

    objects: list[SceneObject]
    kind: str

    def at(self, column: int, row: int) -> list[SceneObject]:
        return [replace(item, column=column, row=row) for item in self.objects]

    def on_side(self, side: int, upright: bool) -> list[SceneObject]:
        """In the middle of a side (0: left or top, 2: right or bottom), a pair spread along it."""
        along = [0, 2] if self.kind == "count" and len(self.objects) == 2 else [1] * len(self.objects)
        cells = [(place, side) if upright else (side, place) for place in along]
        return [replace(item, column=c, row=r) for item, (c, r) in zip(self.objects, cells, strict=True)]


def _join(words: Iterable[str]) -> str:
    return ", ".join(words)


class _Reader:
    """Recursive descent over the words of one prompt."""

    def __init__(self, text: str) -> None:
        self.text = text
        found = re.findall(r"[a-z0-9]+|,|[^\sa-z0-9,.\-]", text.lower())
        for word in found:
            if not re.fullmatch(r"[a-z0-9]+|,", word):
                raise PromptError(f"{word!r} has no meaning in a prompt (in {text!r})")
        if not found:
            raise PromptError('the prompt is empty; try "a red circle left of a blue square"')
        self.words = [_SYNONYMS.get(word, word) for word in found]
        self.position = 0

    def peek(self, ahead: int = 0) -> str:
        index = self.position + ahead
        return self.words[index] if index < len(self.words) else ""

    def take(self, *words: str) -> bool:
        """Consumes ``words`` if they come next."""
        if all(self.peek(index) == word for index, word in enumerate(words)):
            self.position += len(words)
            return True
        return False

    def fail(self, wanted: str, choices: Iterable[str]) -> PromptError:
        word, choices = self.peek(), list(choices)
        if not word:
            return PromptError(f"the prompt ends where {wanted} should follow: {_join(choices)} (in {self.text!r})")
        close = difflib.get_close_matches(word, choices, 1, 0.6) or difflib.get_close_matches(word, _ALL_WORDS, 1, 0.75)
        hint = f"; did you mean {close[0]!r}?" if close and close[0] != word else ""
        kind = "is out of place" if word in _ALL_WORDS or word == "," else "is not a word I know"
        return PromptError(f"{word!r} {kind}: expected {wanted}: {_join(choices)}{hint} (in {self.text!r})")

    def background(self) -> str:
        """Cuts "on a ... background" off the end."""
        if self.words[-1] != "background":
            return "gray"
        end = len(self.words) - 1
        self.position = end - 1
        if self.position < 0 or self.peek() not in BACKGROUNDS:
            self.position = max(self.position, 0)
            raise self.fail("a background colour", BACKGROUNDS)
        colour, start = self.peek(), end - 1
        if start > 0 and self.words[start - 1] in ("a", "the"):
            start -= 1
        if start == 0 or self.words[start - 1] not in ("on", "against"):
            self.position = start
            raise self.fail('"on" before the background', ["on"])
        self.words, self.position = self.words[: start - 1], 0
        if not self.words:
            raise PromptError(f"there is nothing on the background (in {self.text!r})")
        return colour

    def phrase(self) -> tuple[SceneObject, int]:
        """One kind of thing and how many of it."""
        count = _COUNTS.get(self.peek())
        if count is not None:
            self.position += 1
        found: dict[str, str] = {}
        groups = {"size": SIZES, "fill": FILLS, "colour": COLOURS}
        while True:
            word = self.peek()
            name = next((name for name, words in groups.items() if word in words), None)
            if name is None:
                break
            if name in found:
                raise PromptError(f"two words for the {name}: {found[name]!r} and {word!r} (in {self.text!r})")
            found[name] = word
            self.position += 1
        word = self.peek()
        shape = _PLURALS.get(word, word)
        if shape not in SHAPES:
            missing = [words for name, words in groups.items() if name not in found]
            raise self.fail("a shape" if "colour" in found else "a colour and a shape", [*sum(missing, ()), *SHAPES])
        self.position += 1
        if "colour" not in found:
            raise PromptError(f"{word!r} needs a colour: {_join(COLOURS)} (in {self.text!r})")
        if (count or 1) == 1 and word in _PLURALS:
            raise PromptError(f"say how many {word!r}: two or three; or one {shape!r} (in {self.text!r})")
        look = SceneObject(shape, found["colour"], found.get("size", "large"), found.get("fill", "plain"))
        return look, count or 1

    def single(self) -> SceneObject:
        item, count = self.phrase()
        if count != 1:
            raise PromptError(f"only one {item.shape} can stand there, not {count} (in {self.text!r})")
        return item

    def group(self) -> _Group:
        item, count = self.phrase()
        in_front = self.take("in", "front", "of")
        if in_front or self.take("behind"):
            if count != 1:
                raise PromptError(f"only single objects stand in front of or behind each other (in {self.text!r})")
            other = self.single()
            front, behind = (item, other) if in_front else (other, item)
            return _Group([replace(front, layer="front"), replace(behind, layer="behind")], "stack")
        return _Group([item] * count, "count" if count > 1 else "single")

    def relation(self) -> str | None:
        start = self.position
        for word in ("above", "below"):
            if self.take(word):
                return word
        if self.peek() in ("on", "to", "at"):
            self.position += 1
        self.take("the")
        for side in ("left", "right"):
            if self.take(side, "of"):
                return side
        self.position = start
        return None

    def place(self) -> tuple[int, int] | None:
        start = self.position
        if self.peek() in ("at", "in", "on", "to"):
            self.position += 1
        self.take("the")
        words = []
        while self.peek() in _PLACE_WORDS:
            words.append(self.peek())
            self.position += 1
        if not words:
            if self.position > start:
                raise self.fail("a place", _PLACE_WORDS)
            return None
        self.take("corner") or self.take("side")
        rows = [word for word in words if word in ("top", "bottom")]
        columns = [word for word in words if word in ("left", "right")]
        if len(rows) > 1 or len(columns) > 1:
            raise PromptError(f"{' '.join(words)!r} is not a place (in {self.text!r})")
        return _COLUMNS[columns[0] if columns else "centre"], _ROWS[rows[0] if rows else "centre"]

    def picture(self) -> list[SceneObject]:
        group = self.group()
        if self.take("between"):
            if group.kind != "single":
                raise PromptError(f"only one object can be between two others (in {self.text!r})")
            left = self.single()
            if not self.take("and"):
                raise self.fail("the other neighbour", ["and"])
            right = self.single()
            return [
                group.at(1, 1)[0],
                replace(left, column=0, row=1),
                replace(right, column=2, row=1),
            ]
        relation = self.relation()
        if relation:
            other = self.group()
            near, far = (group, other) if relation in ("left", "above") else (other, group)
            upright = relation in ("above", "below")
            return near.on_side(0, upright) + far.on_side(2, upright)
        items = [(group, self.place())]
        while self.peek() in (",", "and"):
            self.position += 1
            self.take("and")
            items.append((self.group(), self.place()))
        if len(items) == 1 and items[0][1] is None:
            if group.kind != "count":
                return group.at(1, 1)
            columns = [0, 2] if len(group.objects) == 2 else [0, 1, 2]
            return [replace(item, column=column, row=1) for item, column in zip(group.objects, columns, strict=True)]
        for member, _ in items:
            if member.kind == "count":
                raise PromptError(
                    f"a counted group takes no place and no list; name each {member.objects[0].shape} with its place "
                    f"(in {self.text!r})"
                )
        if all(place is None for _, place in items) and all(member.kind == "single" for member, _ in items):
            if len(items) > MAX_OBJECTS:
                raise PromptError(f"a picture holds at most {MAX_OBJECTS} objects, got {len(items)} (in {self.text!r})")
            columns = [0, 2] if len(items) == 2 else [0, 1, 2]
            return [member.at(column, 1)[0] for (member, _), column in zip(items, columns, strict=False)]
        objects = []
        for member, place in items:
            if place is None:
                name = _phrase(member.objects[0])
                raise PromptError(f'say where {name!r} is, for example "at the top left" (in {self.text!r})')
            objects += member.at(*place)
        return objects


def parse_prompt(text: str) -> Scene:
    """The scene that ``text`` describes; :class:`PromptError` (a ValueError) if it describes none."""
    if not isinstance(text, str):
        raise TypeError(f"a prompt is a string, got {type(text).__name__}")
    reader = _Reader(text)
    background = reader.background()
    objects = reader.picture()
    if reader.peek():
        raise reader.fail("a relation, a place or the end", [*_RELATIONS, *_LINKS, *_PLACE_WORDS])
    if len(objects) > MAX_OBJECTS:
        raise PromptError(f"a picture holds at most {MAX_OBJECTS} objects, got {len(objects)} (in {text!r})")
    try:
        return Scene(tuple(objects), background)
    except ValueError as error:
        raise PromptError(f"{error} (in {text!r})") from None


def _phrase(item: SceneObject, count: int = 1) -> str:
    words = [word for word in item.appearance[:-1] if word not in ("large", "plain")]
    if count == 1:
        words.append(item.shape)
        return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    plural = next(plural for plural, shape in _PLURALS.items() if shape == item.shape)
    return " ".join([{2: "two", 3: "three"}[count], *words, plural])


def _same(objects: Iterable[SceneObject]) -> bool:
    return len({item.appearance for item in objects}) == 1


def _group_text(objects: tuple[SceneObject, ...]) -> str | None:
    if len(objects) == 2 and objects[0].layer == "front":
        return f"{_phrase(objects[0])} in front of {_phrase(objects[1])}"
    return _phrase(objects[0], len(objects)) if _same(objects) else None


def _place_text(item: SceneObject) -> str:
    row, column = ("top", "", "bottom")[item.row], ("left", "", "right")[item.column]
    return f"at the {' '.join(word for word in (row, column) if word) or 'centre'}"


def _candidates(objects: tuple[SceneObject, ...]) -> Iterator[str]:
    """Sentences that may say it, the most natural first; the last one always does."""
    whole = _group_text(objects)
    if whole:
        yield whole
    for cut in range(1, len(objects)):
        near, far = _group_text(objects[:cut]), _group_text(objects[cut:])
        if near and far:
            yield f"{near} left of {far}"
            yield f"{near} above {far}"
    if len(objects) == 3:
        yield f"{_phrase(objects[0])} between {_phrase(objects[1])} and {_phrase(objects[2])}"
    items, index = [], 0
    while index < len(objects):
        size = 2 if objects[index].layer == "front" else 1
        items.append(f"{_group_text(objects[index : index + size])} {_place_text(objects[index])}")
        index += size
    yield " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def describe(scene: Scene) -> str:
    """A prompt for ``scene``: ``parse_prompt(describe(scene)) == scene`` for every scene."""
    end = "" if scene.background == "gray" else f" on a {scene.background} background"
    for text in _candidates(scene.objects):
        try:
            if parse_prompt(text).objects == scene.objects:
                return text + end
        except PromptError:
            continue
    raise AssertionError(f"no sentence found for {scene}")
