"""The figures of docs/offload.md are those that benchmarks/offload_memory.py measures."""

from pathlib import Path

import pytest

pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["leaf by leaf", "groups of four blocks"])
def test_the_page(name):
    from offload_memory import WAYS, measure

    peak, held = measure(WAYS[name], cache=True)
    row = f"| {name} | {peak / 1e6:.2f} MB | {peak / 1e6:.2f} MB | {held / 1e6:.3f} MB |"
    assert row in (ROOT / "docs/offload.md").read_text()
