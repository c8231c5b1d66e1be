"""What the benchmarks of sequence parallelism share: their options and history, and the eager wire format."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cachedit_kernels.ulysses.layout import even_splits
from common import Case, parser, run
from workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results" / "exchange.csv"
LABELS = ("model", "ranks", "wire", "tokens", "heads")  # tokens and heads of the tensors that rank 0 holds
E4M3 = torch.float8_e4m3fn

Cases = Callable[[Workload, int, int, torch.device], Iterator[Case]]


def run_workloads(description: str | None, cases: Cases) -> None:
    """Measures `cases(workload, tokens, ranks, device)` for every model and number of ranks that is asked for."""
    options = parser(description, RESULTS)
    options.add_argument(
        "--models", nargs="+", choices=[w.name for w in WORKLOADS], default=[w.name for w in WORKLOADS]
    )
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--scale", type=float, help="share of the tokens to take (default: 1, on CPU 1/8)")
    arguments = options.parse_args()
    run(arguments, rows(arguments, cases), LABELS)


def rows(arguments: argparse.Namespace, cases: Cases) -> Iterator[Case]:
    device = torch.device(arguments.device)
    scale = arguments.scale or (1.0 if device.type == "cuda" else 0.125)
    for workload in WORKLOADS:
        if workload.name in arguments.models:
            for ranks in arguments.ranks:
                # as many tokens on every rank, which is what the peers' kernels take
                tokens = max(1, round(workload.tokens * scale / ranks)) * ranks
                yield from cases(workload, tokens, ranks, device)


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def heads_of(workload: Workload, ranks: int) -> int:
    """Of rank 0, which has the most."""
    return even_splits(workload.heads, ranks)[0]


def quantise(x: Tensor) -> Tensor:
    """[..., D] as users write it: E4M3 codes with a float32 scale behind each row, uint8 [..., D + 4]."""
    scales = (x.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-6)
    codes = (x.float() / scales).clamp(-448, 448).to(E4M3)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=-1)


def dequantise(packed: Tensor) -> Tensor:
    head_dim = packed.shape[-1] - 4
    codes = packed[..., :head_dim].view(E4M3)
    scales = packed[..., head_dim:].contiguous().view(torch.float32)
    return (codes.float() * scales).to(torch.bfloat16)
