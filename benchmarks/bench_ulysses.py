"""ulysses_pack and ulysses_unpack against eager torch, torch.compile, cache_dit's kernels and a copy.

What one rank does around the two exchanges of an attention layer, in the default wire format: Q and V in E4M3 and K in
bfloat16 in front of attention ("qkv"), the result in E4M3 behind it ("o"). The exchange itself is not in the figures.
The eager form packs each tensor by itself, as peers do: heads (or tokens) to the front, then quantise.

    python benchmarks/bench_ulysses.py --models FLUX.1 "Wan 2.1 14B" --ranks 2 4 8 --scale 0.125
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

import cachedit_kernels
from attention_cases import E4M3, dequantise, heads_of, quantise, randn, run_workloads
from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, even_splits
from common import Case
from workloads import Workload

QKV = (True, False, True)  # which of q, k, v travel in E4M3


def cases(workload: Workload, tokens: int, ranks: int, device: torch.device) -> Iterator[Case]:
    shards, own_heads = tokens // ranks, heads_of(workload, ranks)
    head_splits, token_splits = even_splits(workload.heads, ranks), (shards,) * ranks
    peer = Peer(workload.heads, ranks) if device.type == "cuda" and Peer.available() else None

    local = [randn(1, shards, workload.heads, workload.head_dim, device=device) for _ in QKV]
    whole = [randn(1, tokens, own_heads, workload.head_dim, device=device)]
    for wire, tensors, splits, dim, float8, eager in (
        ("qkv", local, head_splits, HEADS, QKV, eager_pack_heads),
        ("o", whole, token_splits, SEQUENCE, (True,), eager_pack_tokens),
    ):
        sent = cachedit_kernels.ulysses_pack(tensors, splits, dim, float8)
        yield Case(
            "ulysses_pack",
            torch.bfloat16,
            labels(workload, ranks, wire, tensors[0]),
            sum(tensor.nbytes for tensor in tensors) + sent.nbytes,
            lambda tensors=tensors, splits=splits, dim=dim, float8=float8: cachedit_kernels.ulysses_pack(
                tensors, splits, dim, float8
            ),
            lambda tensors=tensors, float8=float8, eager=eager: eager(tensors, float8),
            peer and peer.pack(wire, tensors),
        )

    for wire, like, splits, dim, float8, eager in (
        ("qkv", whole * 3, token_splits, SEQUENCE, QKV, eager_unpack_heads),
        ("o", local[:1], head_splits, HEADS, (True,), eager_unpack_tokens),
    ):
        shape = like[0].shape
        # blocks arrive from every peer; what one rank packs along the same dimension lies alike
        received = cachedit_kernels.ulysses_pack(like, splits, dim, float8)
        arrived = arrived_apart(like, wire, ranks, float8)
        yield Case(
            "ulysses_unpack",
            torch.bfloat16,
            labels(workload, ranks, wire, like[0]),
            received.nbytes + sum(tensor.nbytes for tensor in like),
            lambda shape=shape, received=received, splits=splits, dim=dim, float8=float8: (
                cachedit_kernels.ulysses_unpack(received, shape, splits, dim, torch.bfloat16, float8)
            ),
            lambda arrived=arrived, float8=float8, eager=eager: eager(arrived, float8),
            peer and peer.unpack(wire, like),
        )


def labels(workload: Workload, ranks: int, wire: str, like: Tensor) -> dict[str, object]:
    return {"model": workload.name, "ranks": ranks, "wire": wire, "tokens": like.shape[1], "heads": like.shape[2]}


def eager_pack_heads(tensors: Sequence[Tensor], float8: Sequence[bool]) -> list[Tensor]:
    """[B, L, H, D] to [H, B, L, ...]: equal or unequal shares of heads lie one after the other."""
    moved = (tensor.permute(2, 0, 1, 3).contiguous() for tensor in tensors)
    return [quantise(tensor) if q else tensor for tensor, q in zip(moved, float8, strict=True)]


def eager_pack_tokens(tensors: Sequence[Tensor], float8: Sequence[bool]) -> list[Tensor]:
    """[B, L, H, D] to [L, B, H, ...]."""
    moved = (tensor.permute(1, 0, 2, 3).contiguous() for tensor in tensors)
    return [quantise(tensor) if q else tensor for tensor, q in zip(moved, float8, strict=True)]


def arrived_apart(like: Sequence[Tensor], wire: str, ranks: int, float8: Sequence[bool]) -> list[Tensor]:
    """What the eager form has received: per tensor [P, H, B, L / P, ...] for Q, K, V, and [H, B, L / P, ...] for O."""
    if wire == "o":  # rank r's heads are its rows, however many
        return [quantise(tensor.permute(2, 0, 1, 3).contiguous()) for tensor in like]
    cut = [torch.stack(tensor.chunk(ranks, dim=1)).permute(0, 3, 1, 2, 4).contiguous() for tensor in like]
    return [quantise(tensor) if q else tensor for tensor, q in zip(cut, float8, strict=True)]


def eager_unpack_heads(arrived: Sequence[Tensor], float8: Sequence[bool]) -> list[Tensor]:
    """To [B, L, H_r, D]."""
    values = (dequantise(tensor) if q else tensor for tensor, q in zip(arrived, float8, strict=True))
    return [value.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2) for value in values]


def eager_unpack_tokens(arrived: Sequence[Tensor], float8: Sequence[bool]) -> list[Tensor]:
    """To [B, L_r, H, D]."""
    values = (dequantise(tensor) if q else tensor for tensor, q in zip(arrived, float8, strict=True))
    return [value.permute(1, 2, 0, 3).contiguous() for value in values]


class Peer:
    """cache_dit's kernels in the order in which its Ulysses attention calls them; heads padded where they must be."""

    def __init__(self, heads: int, ranks: int) -> None:
        self.ranks = ranks
        self.padding = -heads % ranks
        self.share = (heads + self.padding) // ranks

    @staticmethod
    def available() -> bool:
        try:
            import cache_dit.kernels
        except ImportError:
            return False
        return hasattr(cache_dit.kernels, "fp8_comm_qkv_permute_quant")

    def pack(self, wire: str, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        from cache_dit.kernels import fp8_comm_per_token_quant, fp8_comm_qkv_permute_quant

        def heads(x: Tensor, quantised: bool) -> Tensor:
            if self.padding:
                x = pad(x, (0, 0, 0, self.padding))
            batch, length, _, head_dim = x.shape
            x = x.reshape(batch, length, self.ranks, self.share, head_dim)
            return fp8_comm_qkv_permute_quant(x) if quantised else x.permute(2, 1, 0, 3, 4).contiguous()

        def tokens(x: Tensor) -> Tensor:
            batch, length, share, head_dim = x.shape
            x = x.reshape(batch, self.ranks, length // self.ranks, share, head_dim)
            return fp8_comm_per_token_quant(x.permute(1, 3, 0, 2, 4).contiguous())

        if wire == "o":
            return lambda: [tokens(x) for x in tensors]
        return lambda: [heads(x, quantised) for x, quantised in zip(tensors, QKV, strict=True)]

    def unpack(self, wire: str, like: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        from cache_dit.kernels import fp8_comm_per_token_dequant, fp8_comm_qkv_permute_dequant

        batch, length, _, head_dim = like[0].shape
        device = like[0].device
        if wire == "o":
            codes = torch.zeros(self.ranks, self.share, batch, length, head_dim + 2, device=device).to(E4M3)

            def tokens() -> list[Tensor]:
                x = fp8_comm_per_token_dequant(codes).flatten(0, 1).permute(1, 2, 0, 3).contiguous()
                return [x[:, :, : -self.padding].contiguous() if self.padding else x]

            return tokens

        codes = torch.zeros(length, batch, self.share, head_dim + 4, device=device).to(E4M3)
        plain = randn(length, batch, self.share, head_dim, device=device)

        def heads() -> list[Tensor]:
            k = plain.permute(1, 0, 2, 3).contiguous()
            return [fp8_comm_qkv_permute_dequant(codes), k, fp8_comm_qkv_permute_dequant(codes)]

        return heads


if __name__ == "__main__":
    run_workloads(__doc__, cases)
