"""The exchanges of Ulysses over torch.distributed: pack, one all-to-all, unpack.

All split sizes follow from the global sequence length and the number of heads, so that nothing is sent beforehand to
agree on them. Works with every backend that has all_to_all_single for bytes (NCCL; gloo on CPU), and under
`torch.compile`. Where ranks can address each other's memory, packing writes there and takes the all-to-all's place
(transport.py chooses, symmetric.py does it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from cachedit_kernels import _checks
from cachedit_kernels.ulysses import symmetric
from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, even_splits, layout
from cachedit_kernels.ulysses.op import Quantized, grouped, ulysses_pack, ulysses_unpack
from cachedit_kernels.ulysses.transport import chosen


def quantized_all_to_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None = None,
    lengths: int | Sequence[int] | None = None,
    float8: Sequence[bool] = (True, False, True),
    dequantize: bool = True,
) -> tuple[Tensor | Quantized, Tensor | Quantized, Tensor | Quantized]:
    """Scatters the heads of Q, K and V over the ranks of a group and gathers the sequence, in one collective.

    Rank p of P gets `even_splits(H, P)[p]` heads, larger shares first, and may get none. K stays in its own dtype by
    default, as the softmax over QK is sensitive to it.

    Args:
        q, k, v: [B, L_r, H, D], this rank's L_r tokens; what `ulysses_pack` takes. B, H, D and the dtype are the same
            on all ranks.
        group: whose ranks take part; all by default.
        lengths: the global sequence length, of which rank r has `even_splits(length, P)[r]` tokens; or a length for
            each rank; by default all have as many as this one. The same on all ranks.
        float8: which of q, k, v travel in E4M3, with a float32 scale per token and head.
        dequantize: False hands those out as `Quantized`, for attention that takes E4M3.

    Returns:
        q, k, v: [B, L, H_r, D], all tokens of this rank's heads.

    Raises:
        RuntimeError: naming the argument, what was expected and what came; nothing has been sent then. Where ranks
            disagree on `lengths` or shapes, the collective fails.
    """
    op = "quantized_all_to_all"
    _checks.are_tensors(op, q=q, k=k, v=v)
    q_all, k_all, v_all = begin_scatter_heads([q, k, v], group, lengths, float8, dequantize, op).wait()
    return q_all, k_all, v_all


def quantized_all_to_all_output(
    o: Tensor,
    group: dist.ProcessGroup | None = None,
    heads: int | None = None,
    lengths: Sequence[int] | None = None,
    float8: bool = True,
    dequantize: bool = True,
) -> Tensor | Quantized:
    """Scatters the sequence of attention's result over the ranks of a group and gathers the heads, in one collective.

    Args:
        o: [B, L, H_r, D], all tokens of this rank's heads.
        group: whose ranks take part; all by default.
        heads: H, the number of all heads, of which rank r has `even_splits(H, P)[r]`; by default all ranks have as
            many as this one. The same on all ranks.
        lengths: how many tokens each rank gets; `even_splits(L, P)` by default. The same on all ranks.
        float8: whether it travels in E4M3.
        dequantize: as in `quantized_all_to_all`.

    Returns:
        [B, L_r, H, D], this rank's tokens with all heads.

    Raises:
        RuntimeError: as `quantized_all_to_all`.
    """
    op = "quantized_all_to_all_output"
    _checks.are_tensors(op, o=o)
    (result,) = begin_scatter_sequence([o], group, heads, lengths, [float8], dequantize, op).wait()
    return result


class Exchange:
    """An all-to-all under way, as `begin_scatter_heads` and `begin_scatter_sequence` start it."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        scatter: tuple[int, Sequence[int]],
        gather: tuple[int, Sequence[int]],
        float8: Sequence[bool],
        dequantize: bool,
        group: dist.ProcessGroup,
    ) -> None:
        """`scatter` and `gather` are a dimension and the ranks' sizes along it."""
        like = tensors[0]
        shape = list(like.shape)
        shape[scatter[0]] = scatter[1][dist.get_rank(group)]
        shape[gather[0]] = sum(gather[1])
        self._unpack = (shape, gather[1], gather[0], like.dtype, float8, dequantize)
        self._symmetric = chosen(group.group_name, like.device).name == "symmetric"
        if self._symmetric:
            self._where = (like.device, group.group_name)
            self._sent = symmetric.send(tensors, scatter[1], scatter[0], gather[1], gather[0], float8, group.group_name)
        else:
            buffer = ulysses_pack(tensors, scatter[1], scatter[0], float8)
            sent = layout(like.shape, scatter[1], scatter[0], like.element_size(), float8)
            received = layout(shape, gather[1], gather[0], like.element_size(), float8)
            self._sent = funcol.all_to_all_single(
                buffer, [block.nbytes for block in received], [block.nbytes for block in sent], group
            )

    def wait(self) -> list[Tensor | Quantized]:
        """What has arrived; to be called once. On GPUs the current stream waits for it, not the host.

        Ranks that write into each other's memory wait for several exchanges in one order, as they have begun them.
        """
        if self._symmetric:
            arrays = symmetric.receive(self._sent, *self._unpack, *self._where)
            return grouped(arrays, *self._unpack[-2:])
        return ulysses_unpack(funcol.wait_tensor(self._sent), *self._unpack)


def begin_scatter_heads(
    tensors: Sequence[Tensor],
    group: dist.ProcessGroup | None = None,
    lengths: int | Sequence[int] | None = None,
    float8: Sequence[bool] = (True, False, True),
    dequantize: bool = True,
    op: str = "begin_scatter_heads",
) -> Exchange:
    """Starts what `quantized_all_to_all` does, for any number of tensors.

    So each of V, Q and K can leave as soon as it is there, while the next one is computed. `op` is named in errors.
    """
    group, world, rank = _members(op, tensors, float8, group)
    length, heads = tensors[0].shape[1:3]
    if lengths is None:
        lengths = (length,) * world
    elif isinstance(lengths, int):
        lengths = even_splits(lengths, world)
    if len(lengths) != world or lengths[rank] != length:
        raise RuntimeError(
            f"{op}: lengths must be those of {world} ranks, {length} at place {rank}, got {tuple(lengths)}"
        )
    return Exchange(tensors, (HEADS, even_splits(heads, world)), (SEQUENCE, lengths), float8, dequantize, group)


def begin_scatter_sequence(
    tensors: Sequence[Tensor],
    group: dist.ProcessGroup | None = None,
    heads: int | None = None,
    lengths: Sequence[int] | None = None,
    float8: Sequence[bool] = (True,),
    dequantize: bool = True,
    op: str = "begin_scatter_sequence",
) -> Exchange:
    """Starts what `quantized_all_to_all_output` does, for any number of tensors. `op` is named in errors."""
    group, world, rank = _members(op, tensors, float8, group)
    length, own_heads = tensors[0].shape[1:3]
    shares = even_splits(own_heads * world if heads is None else heads, world)
    if shares[rank] != own_heads:
        raise RuntimeError(f"{op}: heads must be a number of which rank {rank} has {own_heads}, got {heads}: {shares}")
    lengths = even_splits(length, world) if lengths is None else lengths
    if len(lengths) != world or sum(lengths) != length:
        raise RuntimeError(f"{op}: lengths must be those of {world} ranks, {length} in all, got {tuple(lengths)}")
    return Exchange(tensors, (SEQUENCE, lengths), (HEADS, shares), float8, dequantize, group)


def _members(
    op: str, tensors: Sequence[Tensor], float8: Sequence[bool], group: dist.ProcessGroup | None
) -> tuple[dist.ProcessGroup, int, int]:
    """The group, its size, and this rank's place in it."""
    _checks.attention_tensors(op, tensors, float8)
    group = dist.distributed_c10d._get_default_group() if group is None else group
    return group, dist.get_world_size(group), dist.get_rank(group)
