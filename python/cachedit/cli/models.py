"""``cachedit models``: the support matrix on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..models.matrix import TITLES, matrix_rows


def run(pattern: str) -> None:
    """Print the rows whose pipeline or transformer has ``pattern`` in its name, in any case.

    Raises:
        ValueError: If no row has.
    """
    rows = [row for row in matrix_rows() if pattern.lower() in f"{row.pipeline} {row.transformer}".lower()]
    if not rows:
        raise ValueError(f"no pipeline or transformer has {pattern!r} in its name")
    table = Table(caption="block lists with their forward patterns; + joins lists that share a decision")
    for title in TITLES:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
