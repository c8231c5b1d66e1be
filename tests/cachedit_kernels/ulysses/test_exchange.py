"""The exchanges over gloo, on 2 and 4 ranks: equal to one process, one collective each, for uneven everything."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cachedit_kernels import quantized_all_to_all, quantized_all_to_all_output
from cachedit_kernels.ulysses import Quantized, begin_scatter_heads, reference
from cachedit_kernels.ulysses import transport as chosen_transport
from cachedit_kernels.ulysses.layout import even_splits
from cachedit_kernels.ulysses.transport import VARIABLE
from counts import COLLECTIVES, Operators
from ranks import run_ranks

worlds = pytest.mark.parametrize("world", [2, 4])
each_transport = pytest.mark.parametrize("transport", ["collective", "symmetric"])  # the latter over shared files
NONE, QV, ALL = (False,) * 3, (True, False, True), (True,) * 3


def forced(transport: str, function: str, *args: Any) -> Any:
    """On a rank: a function of this module with that transport."""
    os.environ[VARIABLE] = transport
    result = globals()[function](*args)
    assert chosen_transport().name == transport
    return result


class Case(NamedTuple):
    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    float8: tuple[bool, ...]
    explicit: bool = False  # uneven lengths of our own, in place of an even split


CASES = [
    Case(16, 8, 32, torch.bfloat16, QV),
    Case(16, 8, 32, torch.float32, NONE),
    Case(19, 6, 24, torch.float32, NONE),  # neither divides by four
    Case(19, 6, 24, torch.bfloat16, QV),
    Case(18, 7, 17, torch.float16, ALL, explicit=True),
    Case(23, 3, 8, torch.float32, NONE, explicit=True),  # on four ranks, one has no heads
    Case(23, 3, 8, torch.bfloat16, QV, explicit=True),
    Case(3, 5, 16, torch.float32, ALL),  # and here one has no tokens
]


def whole(case: Case, batch: int = 2) -> list[Tensor]:
    """Q, K, V as one process has them; equal on all ranks."""
    generator = torch.Generator().manual_seed(case.length)
    shape = (batch, case.length, case.heads, case.head_dim)
    return [torch.randn(shape, generator=generator).to(case.dtype) for _ in range(3)]


def lengths_of(case: Case, world: int) -> tuple[int, ...]:
    if not case.explicit:
        return even_splits(case.length, world)
    rest = even_splits(case.length - 9, world - 1)
    return (rest[0], 9, *rest[1:])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def as_sent(x: Tensor, float8: bool) -> Tensor:
    return reference.from_e4m3(*reference.to_e4m3(x), x.dtype) if float8 else x


def exchange_case(case: Case) -> dict[str, float]:
    """On a rank: both exchanges around attention, each compared with the single process; errors that remain."""
    world, rank = dist.get_world_size(), dist.get_rank()
    lengths, heads = lengths_of(case, world), even_splits(case.heads, world)
    tensors = whole(case)
    shards = [t.split(lengths, dim=1)[rank] for t in tensors]
    given = lengths if case.explicit else case.length
    q, k, v = quantized_all_to_all(*shards, lengths=given, float8=case.float8)
    expected = [as_sent(t, f).split(heads, dim=2)[rank] for t, f in zip(tensors, case.float8)]
    assert all(map(torch.equal, (q, k, v), expected)), f"{case}: Q, K or V differ on rank {rank}"

    kept = quantized_all_to_all(*shards, lengths=given, float8=case.float8, dequantize=False)
    for got, want, quantised in zip(kept, expected, case.float8):
        assert isinstance(got, Quantized) == quantised
        assert torch.equal(reference.from_e4m3(*got, case.dtype) if quantised else got, want)

    o = attention(q, k, v)
    whole_o = attention(*(as_sent(t, f) for t, f in zip(tensors, case.float8)))
    errors = {}
    for float8 in (False, True):
        got = quantized_all_to_all_output(o, heads=case.heads, lengths=lengths, float8=float8)
        want = as_sent(whole_o, float8).split(lengths, dim=1)[rank]
        assert got.shape == want.shape and got.is_contiguous() and got.dtype == case.dtype
        exact = attention(*(t.double() for t in tensors)).split(lengths, dim=1)[rank]
        errors[f"o in {'E4M3' if float8 else 'its dtype'}"] = relative_error(got, exact)
        if not float8:  # attention over fewer heads at once may round otherwise
            rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case.dtype]
            torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)
    return errors


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def run_cases(cases: list[Case]) -> list[dict[str, float]]:
    return [exchange_case(case) for case in cases]


@each_transport
@worlds
def test_exchanges_equal_the_single_process(world: int, transport: str) -> None:
    for errors in run_ranks(forced, world, transport, "run_cases", CASES):
        assert isinstance(errors, list), errors
        for case, error in zip(CASES, errors, strict=True):
            print(case, error)
            exact = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case.dtype]
            for name, value in error.items():
                assert value <= (0.05 if any(case.float8) or "E4M3" in name else exact), (case, error)


def count_operators(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    world, rank = dist.get_world_size(), dist.get_rank()
    shards = [t.split(lengths_of(case, world), dim=1)[rank] for t in whole(case)]
    with Operators("cachedit", *COLLECTIVES) as first:
        q, *_ = quantized_all_to_all(*shards, lengths=lengths_of(case, world))
    with Operators("cachedit", *COLLECTIVES) as second:
        quantized_all_to_all_output(q, heads=case.heads, lengths=lengths_of(case, world))
    return dict(first.counts), dict(second.counts)


def test_one_collective_and_two_kernels_each() -> None:
    """And nothing else: no sizes are exchanged beforehand, though neither lengths nor heads divide."""
    expected = {
        "cachedit::ulysses_pack": 1,
        "_c10d_functional::all_to_all_single": 1,
        "cachedit::ulysses_unpack": 1,
    }
    assert run_ranks(count_operators, 2, CASES[4]) == [(expected, expected)] * 2


def one_after_the_other(case: Case) -> None:
    """V, Q and K leave on their own and arrive in another order."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tensors = whole(case)
    shards = [t.split(lengths_of(case, world), dim=1)[rank] for t in tensors]
    expected = quantized_all_to_all(*shards, lengths=case.length)
    q, k, v = (begin_scatter_heads([t], lengths=case.length, float8=[f]) for t, f in zip(shards, (True, False, True)))
    got = [exchange.wait() for exchange in (k, q, v)]
    assert all(map(torch.equal, (got[1][0], got[0][0], got[2][0]), expected))


def compiled(case: Case) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    shards = [t.split(lengths_of(case, world), dim=1)[rank] for t in whole(case)]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = quantized_all_to_all(q, k * 2, v, lengths=case.length)
        return quantized_all_to_all_output(attention(q, k, v), heads=case.heads, lengths=lengths_of(case, world))

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*shards)
    torch.testing.assert_close(got, step(*shards))


def two_groups(case: Case) -> None:
    """Ranks 0 and 3, and ranks 1 and 2, exchange something of their own at the same time, not in step."""
    groups = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    mine = dist.get_rank() in (1, 2)
    place = dist.get_rank(groups[mine])
    tensors = [t + mine for t in whole(case)]
    shards = [t.split(even_splits(case.length, 2), dim=1)[place] for t in tensors]
    for _ in range(2 if mine else 5):
        q, k, v = quantized_all_to_all(*shards, group=groups[mine], lengths=case.length, float8=NONE)
        assert all(map(torch.equal, (q, k, v), (t.split(even_splits(case.heads, 2), dim=2)[place] for t in tensors)))


def run_checks(case: Case) -> None:
    one_after_the_other(case)
    compiled(case)
    if dist.get_world_size() == 4:
        two_groups(case)
    even = [t.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] for t in whole(CASES[0])]
    q, *_ = quantized_all_to_all(*even)  # by default all lengths, and all numbers of heads, are this rank's
    assert quantized_all_to_all_output(q).shape == even[0].shape


@each_transport
@worlds
def test_overlap_compilation_and_groups(world: int, transport: str) -> None:
    assert run_ranks(forced, world, transport, "run_checks", CASES[2], seconds=200) == [None] * world


def refusals() -> list[str]:
    """Errors before anything is sent, on every rank alike."""
    x = torch.zeros(1, 4, 6, 8)
    rank = dist.get_rank()
    messages = []
    for call in (
        lambda: quantized_all_to_all(x[0], x, x),
        lambda: quantized_all_to_all(x, x[:, :3], x),
        lambda: quantized_all_to_all(x, x, x, lengths=12 if rank == 1 else 6),
        lambda: quantized_all_to_all(x, x, x, lengths=[4]),
        lambda: quantized_all_to_all(x, x, x, float8=[True]),
        lambda: quantized_all_to_all_output(x, heads=16),
        lambda: quantized_all_to_all_output(x, lengths=[1, 2]),
        lambda: quantized_all_to_all_output(x, lengths=[4]),
        lambda: quantized_all_to_all_output(x.double()),
    ):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@each_transport
def test_refusals_name_the_argument(transport: str) -> None:
    qkv, o = "quantized_all_to_all", "quantized_all_to_all_output"
    for rank, messages in enumerate(run_ranks(forced, 2, transport, "refusals")):
        got = ((3, 3), (6, 6))[rank]
        assert messages == [
            f"{qkv}: tensors[0] must have the shape (batch, length, heads, head_dim), got (4, 6, 8)",
            f"{qkv}: tensors[1] must have the shape of tensors[0], (1, 4, 6, 8), got (1, 3, 6, 8)",
            f"{qkv}: lengths must be those of 2 ranks, 4 at place {rank}, got {got}",
            f"{qkv}: lengths must be those of 2 ranks, 4 at place {rank}, got (4,)",
            f"{qkv}: float8 must have one value per tensor, 3, got 1",
            f"{o}: heads must be a number of which rank {rank} has 6, got 16: (8, 8)",
            f"{o}: lengths must be those of 2 ranks, 4 in all, got (1, 2)",
            f"{o}: lengths must be those of 2 ranks, 4 in all, got (4,)",
            f"{o}: tensors[0] must be float32, float16 or bfloat16, got float64",
        ], messages


def one_rank_raises() -> None:
    x = torch.zeros(1, 4, 6, 8)
    if dist.get_rank() == 1:
        raise ValueError("this rank gives up")
    quantized_all_to_all(x, x, x)


@each_transport
def test_a_rank_that_raises_makes_the_others_fail(transport: str) -> None:
    start = time.monotonic()
    results = run_ranks(forced, 2, transport, "one_rank_raises", seconds=60, collective=10)
    assert "this rank gives up" in results[1] and "Error" in results[0], results
    assert time.monotonic() - start < 60
