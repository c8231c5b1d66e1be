"""Writes docs/api.md, the table of all public names.

python docs/make_api.py
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cachedit
import cachedit_kernels

PATH = Path(__file__).with_name("api.md")
INTRODUCTION = """# Public names

Written by `docs/make_api.py` from signatures and docstrings; a test fails when it is out of date. Names, arguments and
defaults that `cache_dit` 1.5 has as well are the same here.
"""


def render() -> str:
    """The text of docs/api.md."""
    engine = "## The engine\n\nImport from `cachedit` or `cachedit_kernels`.\n\n" + table(cachedit)
    operators = "## The operators\n\nImport from `cachedit_kernels`.\n\n" + table(cachedit_kernels)
    return "\n".join([INTRODUCTION, engine, operators])


def table(module: ModuleType) -> str:
    """A row per name in ``__all__``, and per public method of the classes among them."""
    lines = ["| name | kind | arguments | |", "|---|---|---|---|"]
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        if not name.startswith("__"):
            lines.append(row(name, value))
        if inspect.isclass(value):
            lines += [row(f"{name}.{method}", member) for method, member in methods(value)]
    return "\n".join(lines) + "\n"


def row(name: str, value: Any) -> str:
    """One line of the table."""
    documented = callable(value) or isinstance(value, property)
    summary = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ") if documented else ""
    summary = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", summary).replace("``", "`")
    cells = [f"`{name}`", kind(name, value), arguments(value), summary]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def kind(name: str, value: Any) -> str:
    """What sort of thing a name stands for."""
    if not inspect.isclass(value):
        named = "method" if "." in name else "function"
        return "property" if isinstance(value, property) else named if callable(value) else "constant"
    if getattr(value, "_is_protocol", False):
        return "protocol"
    return "enum" if issubclass(value, enum.Enum) else "dataclass" if dataclasses.is_dataclass(value) else "class"


def arguments(value: Any) -> str:
    """Parameters with their defaults; the members of an enum; a constant's value."""
    if isinstance(value, property) or getattr(value, "_is_protocol", False):
        return ""
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return f"`{', '.join(value.__members__)}`"
    if not callable(value):
        return f"`{Default(value)}`"
    parameters = own_parameters(value)
    base = next((cls for cls in inspect.getmro(value)[1:] if public(cls)), None) if inspect.isclass(value) else None
    inherited = own_parameters(base) if base else {}
    new = [parameter for name, parameter in parameters.items() if parameter != inherited.get(name)]
    return f"`{inspect.Signature(new)}`" + (f" and those of `{base.__name__}`" if base else "")


def own_parameters(value: Any) -> dict[str, inspect.Parameter]:
    """Parameters without annotations; a dataclass's default factories are called."""
    factories = (
        {f.name: f.default_factory for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    )
    parameters = {}
    for name, parameter in inspect.signature(value).parameters.items():
        default = parameter.default
        if factories.get(name, dataclasses.MISSING) is not dataclasses.MISSING:
            default = factories[name]()
        if default is not parameter.empty:
            default = Default(default)
        if name != "self":
            parameters[name] = parameter.replace(annotation=parameter.empty, default=default)
    return parameters


class Default:
    """A value that looks as one would write it; an enum's own repr is not that."""

    def __init__(self, value: Any):
        self.text = f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)

    def __repr__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Default) and self.text == other.text


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class does not have from, or in common with, another public class."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("cachedit")]
    inherited = {name for base in ours[1:] if public(base) for name in dir(base)}
    for name in sorted({name for base in ours for name in vars(base)} - inherited):
        value = inspect.getattr_static(cls, name)
        if name.startswith("_"):
            continue
        if isinstance(value, (property, staticmethod, classmethod)) or inspect.isfunction(value):
            yield name, value if isinstance(value, property) else getattr(cls, name)


def public(cls: type) -> bool:
    """Whether a class is one that users import."""
    return getattr(cachedit, cls.__name__, None) is cls


if __name__ == "__main__":
    PATH.write_text(render())
