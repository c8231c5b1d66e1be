"""What the operator benchmarks share: options, measuring candidates in turns, the printed table, the CSV history.

Candidates of a row: ours, eager torch as users write it, torch.compile of the same formula, a peer package where it has
a comparable function, and a copy that moves exactly the bytes of the operator's floor, which is the yardstick.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType

import torch
from torch import nn

import cachedit_kernels
from cachedit_kernels.testing.timing import copy_bandwidth, paired_medians

RESULTS = Path(__file__).parent / "results" / "operators.csv"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MACHINE = ("date", "device", "threads", "torch", "triton", "backend")
FIGURES = (
    *("floor_mb", "ours_ms", "eager_ms", "compile_ms", "peer_ms", "copy_ms", "ours_gbps", "share_of_copy"),
    *("eager_over_ours", "compile_over_ours", "peer_over_ours"),
)


@dataclass(frozen=True)
class Case:
    """One row to measure. `floor` is the fewest bytes that must move; `labels` are columns that tell rows apart."""

    operator: str
    dtype: torch.dtype
    labels: Mapping[str, object]
    floor: int
    ours: Callable[[], object]
    eager: Callable[[], object]
    peer: Callable[[], object] | None = None


def parser(description: str | None, csv: Path = RESULTS) -> argparse.ArgumentParser:
    """The options that all operator benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=csv, help="history to add to (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each candidate takes; medians are reported")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser


def run_sizes(
    description: str | None, cases: Callable[[torch.Size, torch.dtype, torch.device], Iterable[Case]]
) -> None:
    """Measures `cases(shape, dtype, device)` for every size and dtype that is asked for."""
    options = parser(description)
    options.add_argument("--mb", type=float, nargs="+", default=[1, 16, 64, 256], help="MB (2**20 bytes) per tensor")
    options.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    arguments = options.parse_args()

    def rows() -> Iterator[Case]:
        for name in arguments.dtype:
            for mb in arguments.mb:
                dtype = DTYPES[name]
                shape = torch.Size((1, max(1, round(mb * 2**20 / dtype.itemsize / 3072)), 3072))  # FLUX's hidden size
                for case in cases(shape, dtype, torch.device(arguments.device)):
                    size = f"{shape.numel() * dtype.itemsize / 2**20:.2f}"
                    yield replace(case, labels={"mb": size, **case.labels})

    run(arguments, rows(), ("mb", "k"), copy_mb=max(1, min(512, round(4 * max(arguments.mb)))))


def run(arguments: argparse.Namespace, cases: Iterable[Case], labels: tuple[str, ...], copy_mb: int = 256) -> None:
    """Measures the cases, prints a table and adds to the history. `labels` are the cases' own columns."""
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device, copy_mb, arguments.rounds)
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"a copy of {copy_mb} MB reads and writes {bandwidth / 1e9:.1f} GB/s")
    printed = ("operator", "dtype", *labels, *FIGURES[1:])
    columns = (*MACHINE, "operator", "dtype", *labels, *FIGURES)
    print("  ".join(f"{column:>15}" for column in printed), flush=True)
    for case in cases:
        row = measure(case, device, arguments.rounds, compiled=not arguments.no_compile)
        row = {column: row.get(column, "") for column in columns}
        print("  ".join(f"{row[column]!s:>15}" for column in printed), flush=True)
        append(arguments.csv, row)
    print(f"added to {arguments.csv}", file=sys.stderr)


def measure(case: Case, device: torch.device, rounds: int, compiled: bool) -> dict[str, object]:
    source = torch.ones(case.floor // 2, dtype=torch.uint8, device=device)  # zeros may not have pages of their own
    target = torch.ones_like(source)
    candidates = {"ours": case.ours, "eager": case.eager, "copy": lambda: target.copy_(source)}
    if compiled:
        torch.compiler.reset()
        candidates["compile"] = torch.compile(case.eager, fullgraph=True, dynamic=False)
    if case.peer is not None:
        candidates["peer"] = case.peer
    with torch.inference_mode():
        seconds = paired_medians(candidates, device, rounds)
    ours = seconds["ours"]
    row: dict[str, object] = {f"{name}_ms": f"{1e3 * value:.4f}" for name, value in seconds.items()}
    row |= {
        f"{name}_over_ours": f"{seconds[name] / ours:.2f}" for name in ("eager", "compile", "peer") if name in seconds
    }
    row |= machine(device) | {
        "triton": triton_version(),
        "backend": cachedit_kernels.backends()[case.operator][device.type].implementation,
        "operator": case.operator,
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_mb": f"{case.floor / 2**20:.2f}",
        "ours_gbps": f"{case.floor / ours / 1e9:.1f}",
        "share_of_copy": f"{seconds['copy'] / ours:.2f}",
    }
    return row | case.labels


def machine(device: torch.device) -> dict[str, object]:
    """When and on what a row of a history was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "torch": torch.__version__,
    }


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a history, whose columns are the row's keys in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def own_forward(model: nn.Module) -> nn.Module:
    """The model, with a forward of its own to compile.

    dynamo keeps what it has compiled, and which sizes it has seen change, by code object. Candidates of one class that
    are compiled in one process would slow each other down.
    """
    cls = type(model)
    forward = cls.forward
    assert isinstance(forward, FunctionType)
    code = forward.__code__.replace(co_name=f"{forward.__code__.co_name}_{id(model)}")
    copy = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copy, forward)
    model.__class__ = type(cls.__name__, (cls,), {"forward": copy, "__module__": cls.__module__})
    return model


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)
