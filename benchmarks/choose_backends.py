"""Fills the table of which backend serves CUDA tensors by default, from rows that gpu_check.sh measured.

    python benchmarks/choose_backends.py operators.csv exchange.csv [--device "NVIDIA H200"] [--write]

A row of Triton and one of CUDA C++ of the same case (operator, dtype, sizes) make a pair; of several the last one
counts. The two were measured in processes of their own, so each is held against the copy of its floor that it took
turns with: a pair's ratio is (copy / ours) of CUDA C++ over (copy / ours) of Triton. CUDA C++ becomes an operator's
default where the geometric mean of its ratios is at least 1.02. Operators without pairs keep what they have.

Prints the table; --write puts it into cachedit_kernels/cuda_defaults.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import geometric_mean

TABLE = Path(__file__).parents[1] / "cachedit_kernels" / "cuda_defaults.csv"
CASE = ("operator", "dtype", "mb", "k", "model", "ranks", "wire", "tokens", "heads")
WORTH = 1.02  # less may be noise, and Triton serves more GPUs
Row = Mapping[str, str]


def pairs(rows: Iterable[Row]) -> dict[str, list[tuple[Row, Row]]]:
    """By operator, the rows (Triton's, CUDA C++'s) of each case that both have measured."""
    latest = {(row["backend"], *(row.get(column, "") for column in CASE)): row for row in rows}
    found: dict[str, list[tuple[Row, Row]]] = {}
    for (backend, *case), row in latest.items():
        if backend == "triton" and (other := latest.get(("cuda", *case))):
            found.setdefault(row["operator"], []).append((row, other))
    return found


def speed(row: Row) -> float:
    """Against the copy that took turns with it."""
    return float(row["copy_ms"]) / float(row["ours_ms"])


def fill(table: Iterable[Row], rows: Iterable[Row]) -> list[dict[str, str]]:
    """The table with the entries replaced for which there are pairs."""
    measured = pairs(rows)
    filled = []
    for entry in table:
        new = dict(entry)
        if found := measured.get(entry["operator"]):
            ratios = [speed(cuda) / speed(triton) for triton, cuda in found]
            mean = geometric_mean(ratios)
            newest = max((row for pair in found for row in pair), key=lambda row: row["date"])
            new |= {column: newest[column] for column in ("device", "torch", "triton", "date")}
            new |= {"rows": str(len(found)), "cuda_over_triton": f"{mean:.3f}"}
            new["serves"] = "cuda" if mean >= WORTH else "triton"
            print(f"{entry['operator']:>20}: {mean:.3f} ({min(ratios):.2f} to {max(ratios):.2f}) in {len(found)} cases")
        else:
            print(f"{entry['operator']:>20}: no case has rows of both backends")
        filled.append(new)
    return filled


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, table: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+", help="histories of bench_*.py; absent ones are left out")
    parser.add_argument("--device", help="take the rows of this GPU only (default: there must be only one)")
    parser.add_argument("--table", type=Path, default=TABLE, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the table")
    arguments = parser.parse_args()
    rows = [row for path in arguments.csv if path.exists() for row in read(path)]
    rows = [row for row in rows if row["backend"] in ("triton", "cuda")]
    if arguments.device is not None:
        rows = [row for row in rows if row["device"] == arguments.device]
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        parser.error(f"--device must name one of {', '.join(devices)}: the rows are of several GPUs")
    print("CUDA C++ over Triton, geometric mean (lowest to highest)")
    table = fill(read(arguments.table), rows)
    if arguments.write:
        write(arguments.table, table)
        print(f"wrote {arguments.table}", file=sys.stderr)
    else:
        print(*(",".join(row) for row in (table[0], *(entry.values() for entry in table))), sep="\n")


if __name__ == "__main__":
    main()
