"""What the two exchanges of an attention layer cost besides time: bytes on the wire, collectives and kernels.

Prints both as Markdown tables. Bytes follow from `cachedit_kernels/ulysses/layout.py`. Collectives and kernels are
counted on CPU, in ours and in cache_dit's FP8 Ulysses, over a process group that moves nothing; what counts as a kernel
is an operator that writes memory (not views, allocations and waits). cache_dit's own kernels exist for GPUs only: where
they would run, tensors of the shapes that it declares for them are returned, so what is counted is its sequence of
calls. What backends of collectives launch on their own is not counted.

    python benchmarks/count_exchange.py
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import cachedit_kernels
from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, even_splits, layout
from workloads import WORKLOADS, Workload

# Which of Q, K, V, O travel in E4M3.
WIRES = {
    "bf16": (False, False, False, False),
    "default": (True, False, True, True),
    "all FP8": (True, True, True, True),
}
ELEMENT_BYTES = 2
COUNTED_HEADS = 4
COLLECTIVES = ("_c10d_functional", "c10d")
BOOKKEEPING = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


Matrix = tuple[tuple[int, ...], ...]


@functools.cache
def exchanged(workload: Workload, ranks: int, float8: tuple[bool, ...]) -> tuple[Matrix, Matrix]:
    """The bytes of the block from each rank (row) to each rank, in the exchange of Q, K, V and in that of O."""
    lengths, heads = even_splits(workload.tokens, ranks), even_splits(workload.heads, ranks)

    def bytes_to(shape: Sequence[int], splits: Sequence[int], dim: int, wires: Sequence[bool]) -> tuple[int, ...]:
        return tuple(block.nbytes for block in layout(shape, splits, dim, ELEMENT_BYTES, wires))

    return (
        tuple(bytes_to((1, n, workload.heads, workload.head_dim), heads, HEADS, float8[:3]) for n in lengths),
        tuple(bytes_to((1, workload.tokens, h, workload.head_dim), lengths, SEQUENCE, float8[3:]) for h in heads),
    )


def busiest(matrix: Matrix, others: Callable[[int, int], bool]) -> int:
    """The most that a rank sends to or receives from those that `others(rank, peer)` holds for."""
    ranks = range(len(matrix))
    return max(
        max(
            sum(matrix[rank][peer] for peer in ranks if others(rank, peer)),
            sum(matrix[peer][rank] for peer in ranks if others(rank, peer)),
        )
        for rank in ranks
    )


def wire_bytes(workload: Workload, ranks: int, float8: tuple[bool, ...]) -> int:
    """What the busiest rank of each exchange moves, both of a layer added: codes, scales, filling."""
    return sum(busiest(matrix, lambda rank, peer: rank != peer) for matrix in exchanged(workload, ranks, float8))


def bytes_table(ranks: Sequence[int] = (2, 4, 8)) -> str:
    lines = ["| model | ranks | bf16, MB | default, MB | all FP8, MB | default / bf16 |", "|---|---|---|---|---|---|"]
    for workload in WORKLOADS:
        for size in ranks:
            sizes = [wire_bytes(workload, size, float8) for float8 in WIRES.values()]
            megabytes = " | ".join(f"{size / 1e6:.2f}" for size in sizes)
            lines.append(f"| {workload.name} | {size} | {megabytes} | {sizes[1] / sizes[0]:.3f} |")
    return "\n".join(lines)


class Counting(TorchDispatchMode):
    """Counts collectives and kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.namespace in COLLECTIVES:
            if name not in BOOKKEEPING:
                self.collectives[name] += 1
        elif writes_memory(func, result):
            self.kernels[name] += 1
        return result


def writes_memory(func: Any, result: Any) -> bool:
    schema = func._schema
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    is_allocation = "empty" in schema.name
    returns_tensor = any(isinstance(value, Tensor) for value in torch.utils._pytree.tree_leaves(result))
    return returns_tensor and not is_view and not is_allocation


def ours(q: Tensor, k: Tensor, v: Tensor, uneven: bool) -> Tensor:
    lengths = (8, 9 if uneven else 8)
    q, k, v = cachedit_kernels.quantized_all_to_all(q, k, v, lengths=lengths)
    return cachedit_kernels.quantized_all_to_all_output(q, heads=COUNTED_HEADS, lengths=lengths)


def theirs(q: Tensor, k: Tensor, v: Tensor, uneven: bool) -> Tensor:
    """As its Ulysses attention does it, attention left out."""
    from cache_dit.distributed.core._distributed_primitives import _All2AllComm

    mesh = SimpleNamespace(get_group=lambda: dist.group.WORLD)
    exchange = _All2AllComm(SimpleNamespace(_ulysses_mesh=mesh, ulysses_anything=uneven, ulysses_float8=True))
    q = exchange.send_q(q).wait()
    pending = exchange.send_k(k), exchange.send_v(v)
    k, v = (handle.wait() for handle in pending)
    return exchange.send_o(q).wait()


def give_cpu_shapes() -> None:
    """Lets cache_dit's kernels be called on CPU, where they return memory of the shapes that it declares."""
    import cache_dit.kernels.triton  # noqa: F401 (registers them)

    def declared(name: str) -> Callable[[Tensor], Tensor]:
        def allocate(x: Tensor) -> Tensor:
            with FakeTensorMode() as fakes:
                like = getattr(torch.ops.cache_dit_triton_ops, name)(fakes.from_tensor(x))
            return torch.empty(like.shape, dtype=like.dtype)

        return allocate

    for kernel in ("per_token_quant", "per_token_dequant", "qkv_permute_quant", "qkv_permute_dequant"):
        name = f"fp8_comm_{kernel}"
        torch.library.impl(f"cache_dit_triton_ops::{name}", "CPU", declared(name))


def count(exchange: Callable[..., Tensor], batch: int, uneven: bool) -> tuple[Counter[str], Counter[str]]:
    """The collectives and the kernels of both exchanges, by name."""
    q, k, v = (torch.randn(batch, 8, COUNTED_HEADS, 32, dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad(), Counting() as counting:
        result = exchange(q, k, v, uneven)
    assert result.shape == q.shape
    return counting.collectives, counting.kernels


def counts() -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Of ours and, where it is installed, of cache_dit's; on rank 0 of two, of which the other one is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        exchanges: dict[str, Callable[..., Tensor]] = {"ours": ours}
        try:
            give_cpu_shapes()
            exchanges["cache_dit"] = theirs
        except ImportError as error:
            print(f"cache_dit is not counted: {error}", file=sys.stderr)
        return {
            f"{name}, {case}": count(exchange, batch, uneven)
            for name, exchange in exchanges.items()
            for case, batch, uneven in (("batch 1", 1, False), ("batch 2", 2, False), ("uneven lengths", 1, True))
        }
    finally:
        dist.destroy_process_group()


def counts_table() -> str:
    lines = ["| exchange | collectives | kernels | which |", "|---|---|---|---|"]
    for name, (collectives, kernels) in counts().items():
        listed = ", ".join(f"{n} {operator.partition('::')[2]}" for operator, n in (collectives + kernels).items())
        lines.append(f"| {name} | {collectives.total()} | {kernels.total()} | {listed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("MB (10**6 bytes) that the busiest rank exchanges with others per layer with attention:\n")
    print(bytes_table())
    print("\nCalls per layer with attention:\n")
    print(counts_table())
