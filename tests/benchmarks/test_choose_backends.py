"""The table of default backends, filled from histories that are made up."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from cachedit_kernels import _backend

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "benchmarks" / "choose_backends.py"
HEADER = "date,device,torch,triton,backend,operator,dtype,mb,k,ours_ms,copy_ms"


def choose(tmp_path: Path, rows: list[str], *options: str) -> tuple[dict[str, dict[str, str]], str]:
    """The table that the tool writes, and what it says."""
    history, table = tmp_path / "operators.csv", tmp_path / "table.csv"
    history.write_text("\n".join([HEADER, *rows]) + "\n")
    table.write_text((ROOT / "cachedit_kernels" / "cuda_defaults.csv").read_text())
    command = [sys.executable, TOOL, history, tmp_path / "absent.csv", "--table", table, "--write", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    with table.open() as file:
        return {row["operator"]: row for row in csv.DictReader(file)}, result.stdout + result.stderr


def row(backend: str, operator: str, ours: float, copy: float = 1.0, size: int = 64, device: str = "GPU A") -> str:
    return f"2026-12-01,{device},2.11,3.6,{backend},{operator},bfloat16,{size},,{ours},{copy}"


def test_the_faster_one_serves(tmp_path: Path) -> None:
    table, said = choose(
        tmp_path,
        [
            # twice as fast and, where the machine was half as fast in between, as fast: 2**0.5 in the mean
            *(row("triton", "l1", 2.0), row("cuda", "l1", 1.0)),
            *(row("triton", "l1", 2.0, size=1), row("cuda", "l1", 4.0, copy=2.0, size=1)),
            *(row("triton", "residual_l1", 1.0), row("cuda", "residual_l1", 1.25)),
            # too little to count
            *(row("triton", "residual_push", 1.01), row("cuda", "residual_push", 1.0)),
            # the last row counts
            *(row("triton", "ulysses_pack", 1.0), row("cuda", "ulysses_pack", 9.0), row("cuda", "ulysses_pack", 0.5)),
            # no pairs: another size, another backend, and an operator that CUDA C++ does not serve
            *(row("triton", "ulysses_unpack", 9.0), row("cuda", "ulysses_unpack", 1.0, size=1)),
            *(row("cpp", "merge_attention", 9.0), row("cuda", "merge_attention", 1.0)),
            *(row("triton", "ring_gram", 9.0), row("cuda", "ring_gram", 1.0)),
        ],
    )
    got = {name: (entry["serves"], entry["cuda_over_triton"], entry["rows"]) for name, entry in table.items()}
    assert got == {
        "l1": ("cuda", "1.414", "2"),
        "residual_l1": ("triton", "0.800", "1"),
        "residual_push": ("triton", "1.010", "1"),
        "ulysses_pack": ("cuda", "2.000", "1"),
        "ulysses_unpack": ("triton", "", ""),
        "merge_attention": ("triton", "", ""),
        "residual_forecast": ("triton", "", ""),
    }
    assert (table["l1"]["device"], table["l1"]["date"]) == ("GPU A", "2026-12-01")
    assert table["ulysses_unpack"]["device"] == ""
    assert "merge_attention: no case has rows of both backends" in said


def test_one_gpu_at_a_time(tmp_path: Path) -> None:
    rows = [row("triton", "l1", 2.0), row("cuda", "l1", 1.0), row("cuda", "l1", 9.0, device="GPU B")]
    table, said = choose(tmp_path, rows)
    assert "--device must name one of GPU A, GPU B" in said and table["l1"]["rows"] == ""
    assert choose(tmp_path, rows, "--device", "GPU A")[0]["l1"]["serves"] == "cuda"


def test_the_table_names_operators_and_says_what_is_not_measured() -> None:
    assert set(_backend.CUDA_DEFAULTS) < set(_backend.OPERATORS)
    for entry in _backend.CUDA_DEFAULTS.values():
        assert entry["serves"] in ("triton", "cuda")
        measured = [bool(entry[column]) for column in ("device", "torch", "triton", "date", "rows", "cuda_over_triton")]
        assert all(measured) or (not any(measured) and entry["serves"] == "triton")
