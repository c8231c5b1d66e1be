"""Attention over sequences whose pieces lie on several ranks: Ulysses, ring, and both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import cachedit_kernels as kernels
from cachedit_kernels.ulysses import Exchange, begin_scatter_heads, begin_scatter_sequence

from .config import ParallelismConfig
from .groups import Groups, all_gather
from .split import Pieces

__all__ = ["LSE_BACKENDS", "Attend", "Coming", "SequenceAttention", "attention_with_lse"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Coming = Callable[[], Tensor]  # waits for a tensor that is under way

# Backends of diffusers that hand out the log-sum-exps that ring attention merges by.
LSE_BACKENDS = ("native", "flash", "flash_hub", "_flash_3", "_flash_3_hub", "sage", "sage_hub")


class SequenceAttention:
    """Attention of one transformer, on this rank. Tensors are [B, L, H, D].

    Args:
        groups: Ranks to exchange with.
        config: Which wire format, how to rotate.
        pieces: What is known of the sequences in the running forward.
        backend: Name of the diffusers backend that computes what is left to one rank; None for the active one.
    """

    def __init__(self, groups: Groups, config: ParallelismConfig, pieces: Pieces, backend: str | None):
        self.groups = groups
        self.float8 = config.ulysses_float8
        self.rotate = config.ring_rotate_method
        self.dtype = torch.float32 if config.ring_convert_to_fp32 else None
        self.pieces = pieces
        self.backend = backend

    @property
    def context_parallel_config(self) -> Any:
        """Diffusers looks here when its own backend is set on a model whose attention is parallel already."""
        raise RuntimeError(
            "attention is sequence-parallel here: set its backend with ParallelismConfig(attention_backend=...), not "
            "with set_attention_backend"
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, local: Attend, scale: float | None
    ) -> Tensor:
        """Attention over all ranks' tokens.

        Args:
            q: [B, Lq, H, D], this rank's tokens, all heads.
            k, v: [B, Lk, H, D], the same; their sequence may be another one than q's.
            mask: None, or as :meth:`Pieces.mask` takes it.
            local: Attention on one rank, for where no ring is.
            scale: As in ``scaled_dot_product_attention``.

        Returns:
            [B, Lq, H, D].
        """
        sizes = self.pieces.lengths(q.shape[1])
        key_sizes = self.pieces.lengths(k.shape[1])
        if mask is not None:
            mask = self._own_rows(mask, sizes, key_sizes)
        group = self.groups.ulysses
        if group is None:
            return self._attend(q, k, v, mask, local, key_sizes, scale)
        heads, members = q.shape[2], self._members()
        if key_sizes == sizes:
            wire = (self.float8, False, self.float8)
            q, k, v = _arrived(begin_scatter_heads([q, k, v], group, sizes[members], wire))
        else:
            first = begin_scatter_heads([q], group, sizes[members], (self.float8,))
            k, v = _arrived(begin_scatter_heads([k, v], group, key_sizes[members], (False, self.float8)))
            (q,) = _arrived(first)
        out = self._attend(q, k, v, mask, local, key_sizes, scale)
        return _arrived(begin_scatter_sequence([out], group, heads, sizes[members], (self.float8,)))[0]

    def begin(self, part: Callable[[str], Tensor], mask: Tensor | None, local: Attend) -> Coming:
        """The same over one sequence, with every exchange under way while something else is computed.

        V, Q and K travel in a collective each, so that there are 4 of them in all, not 2.

        Args:
            part: Computes ``"v"``, ``"q"`` or ``"k"``, [B, L, H, D] of this rank's tokens, all heads. V is asked for
                first, and each leaves before the next is asked for.
            mask, local: As above.

        Returns:
            What waits for the result, [B, L, H, D].
        """
        group, members = self.groups.ulysses, self._members()
        value = part("v")
        length, heads = value.shape[1:3]
        sizes = self.pieces.lengths(length)
        coming = [
            begin_scatter_heads([value], group, sizes[members], (self.float8,)),
            begin_scatter_heads([part("q")], group, sizes[members], (self.float8,)),
            begin_scatter_heads([part("k")], group, sizes[members], (False,)),
        ]
        if mask is not None:
            mask = self._own_rows(mask, sizes, sizes)
        v, q, k = (_arrived(exchange)[0] for exchange in coming)  # waited for in the order in which they have begun
        out = self._attend(q, k, v, mask, local, sizes, None)
        result = begin_scatter_sequence([out], group, heads, sizes[members], (self.float8,))
        return lambda: _arrived(result)[0]

    def _members(self) -> slice:
        """Those of the pieces that the Ulysses group's ranks hold."""
        count = self.groups.sizes.ulysses
        return slice(self.groups.ring_rank * count, (self.groups.ring_rank + 1) * count)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        local: Attend,
        key_sizes: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        """Attention over the heads that this rank has, which may be none."""
        if not q.shape[2]:
            return torch.empty_like(q)
        return local(q, k, v, mask) if self.groups.ring is None else self._ring(q, k, v, mask, key_sizes, scale)

    def _own_rows(self, mask: Tensor, sizes: tuple[int, ...], key_sizes: tuple[int, ...]) -> Tensor:
        """A mask over all keys, of the queries that this rank attends for."""
        mask = self.pieces.mask(mask, sizes, key_sizes)
        members = self._members()
        return mask if mask.shape[2] == 1 else mask.narrow(2, sum(sizes[: members.start]), sum(sizes[members]))

    def _ring(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sizes: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        """Ring attention (arXiv 2310.01889): every rank's keys and values pass by; what they give is merged."""
        ring, per_rank = self.groups.sizes.ring, self.groups.sizes.ulysses
        lengths = [sum(sizes[i * per_rank : (i + 1) * per_rank]) for i in range(ring)]
        masks = [None] * ring if mask is None else mask.split(lengths, dim=-1)
        passing = _allgathered if self.rotate == "allgather" else _passed_on
        out = lse = None
        for rank, keys, values in passing(k, v, lengths, self.groups):
            if 0 in (q.shape[1], keys.shape[1]):  # kernels need not take such
                continue
            o, e = attention_with_lse(q, keys, values, masks[rank], scale, self.backend)
            if out is None or lse is None:
                out, lse = (o if self.dtype is None else o.to(self.dtype)), e
            else:
                out, lse = kernels.merge_attention(out, lse, o, e)
        return torch.zeros_like(q) if out is None else out.to(q.dtype)


Passing = Iterator[tuple[int, Tensor, Tensor]]  # a rank of the ring, its keys and values


def _arrived(exchange: Exchange) -> list[Tensor]:
    return cast("list[Tensor]", exchange.wait())


def _passed_on(k: Tensor, v: Tensor, lengths: Sequence[int], groups: Groups) -> Passing:
    """Own keys and values, then those of the rank before, ...: the next ones arrive while these are worked on."""
    group, me, ring = groups.ring, groups.ring_rank, groups.sizes.ring
    assert group is not None
    to, of = (dist.get_global_rank(group, (me + shift) % ring) for shift in (1, -1))
    sent = torch.stack([k, v])
    for i in range(ring):
        rank = (me - i) % ring
        waiting: list[dist.Work] = []
        coming = sent
        if i + 1 < ring:
            b, _, h, d = k.shape
            coming = sent.new_empty(2, b, lengths[(rank - 1) % ring], h, d)
            swap = [dist.P2POp(dist.isend, sent, to, group), dist.P2POp(dist.irecv, coming, of, group)]
            waiting = dist.batch_isend_irecv(swap)
        yield rank, sent[0], sent[1]
        for work in waiting:
            work.wait()
        sent = coming


def _allgathered(k: Tensor, v: Tensor, lengths: Sequence[int], groups: Groups) -> Passing:
    """All ranks' keys and values, fetched in one collective; own ones first."""
    b, _, h, d = k.shape
    longest, me = max(lengths), groups.ring_rank
    sent = k.new_zeros(2, b, longest, h, d)
    sent[0, :, : lengths[me]], sent[1, :, : lengths[me]] = k, v
    everyone = sent.new_empty(2 * len(lengths), *sent.shape[1:])
    all_gather(everyone, sent, group=groups.ring)
    for i in range(len(lengths)):
        rank = (me - i) % len(lengths)
        keys, values = everyone[2 * rank : 2 * rank + 2, :, : lengths[rank]]
        yield rank, keys, values


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

    Args:
        q: [B, Lq, H, D].
        k, v: [B, Lk, H, D].
        mask: None, or [B, 1, 1 or Lq, Lk], boolean (True takes part) or added to the scores.
        scale: Default: 1 / sqrt(D).
        backend: One of ``LSE_BACKENDS``, None for native.

    Returns:
        [B, Lq, H, D] and float32 [B, Lq, H]; where a mask leaves no key, zeros and -inf.
    """
    if backend not in (None, "native"):
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        call = _AttentionBackendRegistry._backends[AttentionBackendName(backend)]
        out, lse, *_ = call(q, k, v, attn_mask=mask, scale=scale, return_lse=True)
        return out, lse.squeeze(-1) if lse.dim() == 4 else lse
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    none = None if mask is None else torch.isneginf(mask).all(-1).transpose(1, 2)  # [B, 1 or Lq, 1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu":
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = cpu(q, k, v, attn_mask=mask, scale=scale)
    elif mask is None and q.dtype is not torch.float32:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    else:
        if mask is not None:
            mask = mask.expand(*q.shape[:2], q.shape[2], k.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)[:2]
        lse = lse[..., : q.shape[2]]  # it comes padded
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    if none is not None:  # what comes out where no key is left differs between devices
        out, lse = out.masked_fill(none[..., None], 0.0), lse.masked_fill(none, -torch.inf)
    return out, lse.float()
