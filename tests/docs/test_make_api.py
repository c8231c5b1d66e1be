import enum
import importlib.util
from pathlib import Path

import pytest

import cachedit
import cachedit_kernels

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
make_api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_api)


def test_names_and_signatures_are_those_of_the_table():
    assert (DOCS / "api.md").read_text() == make_api.render(), "run docs/make_api.py and look at the difference"


def test_every_name_has_a_row_and_says_what_it_is():
    rows = [line.split(" | ") for line in make_api.render().splitlines() if line.startswith("| `")]
    names = {row[0].strip("| `") for row in rows}
    public = {*cachedit.__all__, *cachedit_kernels.__all__} - {"__version__"}
    assert public <= names and {name.partition(".")[0] for name in names} == public
    for name, kind, _, says in rows:
        assert kind in ("constant", "property") or says.strip(" |"), f"{name} has no docstring"


class Colour(enum.Enum):
    """A colour."""

    RED = 1


def paint(colour=Colour.RED, *, layers: "int | None" = None, **others) -> None:
    """Paint, as :class:`Colour` says.

    More.
    """


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (paint, "| `name` | function | `(colour=Colour.RED, *, layers=None, **others)` | Paint, as `Colour` says. |"),
        (Colour, "| `name` | enum | `RED` | A colour. |"),
        (Colour.RED, "| `name` | constant | `Colour.RED` |  |"),
        (cachedit.FoCaCalibratorConfig,
         "| `name` | dataclass | `(enable_calibrator=True, enable_encoder_calibrator=True, calibrator_type='foca')` "
         "and those of `CalibratorConfig` | "),
    ],
)  # fmt: skip
def test_rows(value, line):
    assert make_api.row("name", value).startswith(line)


def test_methods_are_listed_where_they_come_from():
    listed = {cls.__name__: [name for name, _ in make_api.methods(cls)] for cls in
              (cachedit.BasicCacheConfig, cachedit.DBCacheConfig, cachedit.PatchFunctor)}  # fmt: skip
    assert {"as_dict", "empty", "reset", "strify", "update", "validate"} <= set(listed["BasicCacheConfig"])
    assert listed["DBCacheConfig"] == [] and listed["PatchFunctor"] == ["applied", "apply", "undo"]
