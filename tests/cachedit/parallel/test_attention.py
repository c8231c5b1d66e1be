"""Attention over pieces on gloo ranks, against one process: masks, two lengths, grouped heads, no heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cachedit import ParallelismConfig
from cachedit.parallel.attention import SequenceAttention, attention_with_lse
from cachedit.parallel.config import Sizes
from cachedit.parallel.groups import Groups
from cachedit.parallel.processors import _Interception
from cachedit.parallel.split import Pieces
from cachedit_kernels.ulysses.layout import even_splits
from ranks import run_ranks


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """In float64; tensors are [B, L, H, D]."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    mask = mask if mask is None or mask.dtype is torch.bool else mask.double()
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa).transpose(1, 2)


class Case(NamedTuple):
    queries: int
    keys: int | None = None  # another sequence than the queries'
    heads: int = 6
    shared: int = 1  # so many heads of queries have the same keys
    mask: str = ""
    whole_mask: bool = False
    scale: float | None = None


CASES = [
    Case(16),
    Case(37, heads=5, scale=0.3),
    Case(37, heads=3),  # on 4 ranks, one is without heads
    Case(41, keys=23),
    Case(24, heads=6, shared=3),
    Case(33, mask="bool"),
    Case(33, mask="added"),
    Case(29, keys=50, mask="bool", whole_mask=True),
    Case(6, keys=5),  # alike on some ranks
    Case(3),  # some ranks have none of 4
    Case(26, mask="first only"),  # some ranks' keys are all masked
]
SIZES = {2: [Sizes(1, 2, 1), Sizes(2, 1, 1)], 4: [Sizes(1, 4, 1), Sizes(2, 2, 1), Sizes(4, 1, 1)]}


def mask_of(case: Case, length: int) -> Tensor | None:
    if not case.mask:
        return None
    if case.mask == "first only":
        return (torch.arange(length) < 3).expand(2, length)
    keep = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[:, 0] = True
    return keep if case.mask == "bool" else torch.where(keep, 0.5, -2.0)[:, None, None]


def errors_on_a_rank(world: int) -> dict[Any, float]:
    errors: dict[Any, float] = {}
    for sizes in SIZES[world]:
        groups = Groups(sizes, torch.distributed.group.WORLD, "cpu")
        for case in CASES:
            length = case.keys or case.queries
            generator = torch.Generator().manual_seed(case.queries)
            q = torch.randn(2, case.queries, case.heads, 16, generator=generator)
            k, v = torch.randn(2, 2, length, case.heads // case.shared, 16, generator=generator)
            mask = mask_of(case, length)
            broadcast = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
            expected = sdpa(q, k, v, broadcast, case.scale)

            pieces = Pieces(groups.sequence)
            own_q = pieces.split(q, 1, "q")
            own_k, own_v = (pieces.split(t, 1, "k" if case.keys else "q") for t in (k, v))
            own_mask = mask if mask is None or case.whole_mask else pieces.split(mask, -1)
            for rotate in ("p2p", "allgather"):
                config = ParallelismConfig(ring_rotate_method=rotate)
                attention = SequenceAttention(groups, config, pieces, None)
                with _Interception(attention):
                    out = F.scaled_dot_product_attention(
                        *(t.transpose(1, 2) for t in (own_q, own_k, own_v)),
                        attn_mask=own_mask,
                        scale=case.scale,
                        enable_gqa=case.shared > 1,
                    ).transpose(1, 2)
                mine = expected.split(even_splits(case.queries, world), 1)[pieces.mine]
                errors[str((case, sizes, rotate))] = float((out - mine).abs().max()) if out.numel() else 0.0
                assert out.shape == mine.shape
    return errors


@pytest.mark.parametrize("world", [2, 4])
def test_equal_to_one_process(world):
    for errors in run_ranks(errors_on_a_rank, world, world):
        assert not isinstance(errors, str), errors
        assert len(errors) == 2 * len(CASES) * len(SIZES[world])
        assert {key: error for key, error in errors.items() if not error < 2e-6} == {}


@pytest.mark.parametrize("mask", [None, "bool", "added", "first only"])
def test_log_sum_exp(mask):
    q, k, v = torch.randn(3, 2, 12, 4, 16, generator=torch.Generator().manual_seed(0))
    given = None if mask is None else mask_of(Case(12, mask=mask), 12)
    given = given[:, None, None] if given is not None and given.dim() == 2 else given
    out, lse = attention_with_lse(q, k, v, given, 0.2, None)
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) * 0.2
    if given is not None:
        added = given.double() if given.dtype.is_floating_point else torch.where(given, 0.0, -torch.inf).double()
        scores = scores + added
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), sdpa(q, k, v, given, 0.2), rtol=1e-5, atol=1e-5)


def test_keys_that_are_all_masked():
    q, k, v = torch.randn(3, 1, 5, 2, 16, generator=torch.Generator().manual_seed(0))
    out, lse = attention_with_lse(q, k, v, torch.zeros(1, 1, 1, 5, dtype=torch.bool), None, None)
    assert not out.any() and torch.isneginf(lse).all() and lse.dtype is torch.float32


def refusals_on_a_rank() -> list[str]:
    groups = Groups(Sizes(1, 2, 1), torch.distributed.group.WORLD, "cpu")
    pieces = Pieces(groups.sequence)
    q = pieces.split(torch.zeros(1, 12, 2, 8), 1, "q")
    attention = SequenceAttention(groups, ParallelismConfig(), pieces, None)
    told = []
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(1, 1, 6, 6)}, {"attn_mask": torch.ones(1, 7)}):
        try:
            with _Interception(attention):
                F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, **options)
        except ValueError as error:
            told.append(str(error))
    try:
        attention.context_parallel_config  # noqa: B018
    except RuntimeError as error:
        told.append(str(error))
    return told


def test_what_is_refused():
    for told in run_ranks(refusals_on_a_rank, 2):
        assert len(told) == 4, told
        assert "is_causal must be False" in told[0]
        assert "the same for all queries and heads" in told[1] and "(1, 1, 6, 6)" in told[1]
        assert "over all 12 keys, or over the 6 keys of this rank" in told[2] and "(1, 7)" in told[2]
        assert "ParallelismConfig(attention_backend=...)" in told[3]
