"""merge_attention against eager torch, torch.compile, cache_dit's kernel and a copy of the same bytes.

One step of ring attention on one rank: the running result (dtype of the row: float32 as rings usually keep it, or
bfloat16) takes in a bfloat16 result over the next keys. cache_dit's kernel takes two results of one dtype.

    python benchmarks/bench_attention.py --models FLUX.1 "Wan 2.1 14B" --ranks 2 4 8 --scale 0.125
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import cachedit_kernels
from attention_cases import randn, run_workloads
from common import Case
from workloads import Workload


def cases(workload: Workload, tokens: int, ranks: int, device: torch.device) -> Iterator[Case]:
    shape = (1, tokens // ranks, workload.heads, workload.head_dim)
    out2 = randn(*shape, device=device)
    lse, lse2 = (randn(*shape[:3], device=device, dtype=torch.float32) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        out = randn(*shape, device=device, dtype=dtype)
        yield Case(
            "merge_attention",
            dtype,
            {"model": workload.name, "ranks": ranks, "wire": "", "tokens": shape[1], "heads": shape[2]},
            2 * out.nbytes + out2.nbytes + 3 * lse.nbytes,
            lambda out=out: cachedit_kernels.merge_attention(out, lse, out2, lse2),
            lambda out=out: eager(out, lse, out2, lse2),
            peer(out, lse, out2, lse2),
        )


def eager(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid form in which ring attention is usually written; the difference is the share of the second result."""
    share = torch.sigmoid(lse2 - lse).unsqueeze(-1)
    merged = out.float() - share * (out.float() - out2.float())
    return merged.to(out.dtype), lse - logsigmoid(lse - lse2)


def peer(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> Callable[[], object] | None:
    try:
        from cache_dit.kernels import fused_merge_attn_states
    except ImportError:
        return None
    if out.device.type != "cuda":  # it has no other kernel
        return None
    logs = lse.unsqueeze(-1), lse2.unsqueeze(-1)
    return lambda: fused_merge_attn_states(out, logs[0], out2.to(out.dtype), logs[1])


if __name__ == "__main__":
    run_workloads(__doc__, cases)
