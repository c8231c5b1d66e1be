"""The support matrix: what the tables say, one row per pipeline class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .pipelines import PIPELINES
from .table import MODELS, BlockList

__all__ = ["TITLES", "MatrixRow", "describe_lists", "matrix_rows"]

TITLES = ("pipeline", "transformer", "block lists", "guidance", "tested")


class MatrixRow(NamedTuple):
    """One row; all cells are text.

    Args:
        pipeline: A pipeline class; empty for a transformer that no pipeline class runs.
        transformer: The class of its transformers.
        blocks: Their block lists with their patterns: see :func:`describe_lists`.
        guidance: See ``PipelineEntry.guidance``.
        tested: ``yes`` or ``no``.
    """

    pipeline: str
    transformer: str
    blocks: str
    guidance: str
    tested: str


def matrix_rows() -> Iterator[MatrixRow]:
    """The rows, in the alphabetical order of pipelines; then transformers that no pipeline class runs."""
    for name, entry in PIPELINES.items():
        blocks = describe_lists(entry.transformer)
        yield MatrixRow(name, entry.transformer, blocks, entry.guidance, "yes" if entry.tried else "no")
    for name in sorted(set(MODELS) - {entry.transformer for entry in PIPELINES.values()}):
        yield MatrixRow("", name, describe_lists(name), "", "yes")


def describe_lists(transformer: str) -> str:
    """A transformer's block lists in calling order, each with the number of its pattern.

    ``+`` joins lists that share a decision, ``;`` parts those that decide separately. In parentheses: what blocks call
    their streams, where that is unusual.
    """
    return "; ".join(" + ".join(_describe(item) for item in group) for group in MODELS[transformer].sections)


def _describe(item: BlockList) -> str:
    usual = BlockList(item.name, item.pattern).streams
    names = [given for given, name in zip(item.streams, usual, strict=True) if given != name]
    return f"{item.name} {item.pattern.name[-1]}" + (f" ({', '.join(names)})" if names else "")
