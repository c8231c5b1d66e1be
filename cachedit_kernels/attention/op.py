"""`merge_attention`: schema, fake and the function that users call."""

from __future__ import annotations

import torch
from torch import Tensor

from cachedit_kernels import _checks
from cachedit_kernels._library import define


def merge_attention(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each: the running merge of ring attention.

    With `w = exp(lse) / (exp(lse) + exp(lse2))` the results are `w * out + (1 - w) * out2` and
    `log(exp(lse) + exp(lse2))`, worked out from the gap between both, so that none is too large or too small
    (arXiv 2310.01889, 2205.14135). Terms are accumulated in float32 and rounded once.

    A result of weight zero is not read: one over no keys at all has an lse of -inf and may be uninitialised memory.
    Where both are empty, the merged result is 0 and its lse -inf.

    Args:
        out: [B, L, H, D], one set's attention result, float32, float16 or bfloat16, any strides.
        lse: float32 [B, L, H], the log of the sum of the exponentials that `out` was divided by, any strides.
        out2: the other set's result, of the same shape; its dtype may differ from `out`'s where that is float32, as
            a running result's is.
        lse2: float32 [B, L, H].

    Returns:
        A new contiguous tensor [B, L, H, D] of `out`'s dtype, and a new contiguous float32 [B, L, H]. NaN passes.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    _checks.are_tensors("merge_attention", out=out, lse=lse, out2=out2, lse2=lse2)
    return _merge_attention(out, lse, out2, lse2)  # type: ignore[no-any-return]


def _merge_attention_fake(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    _checks.merge_attention(out, lse, out2, lse2)
    return (
        torch.empty_like(out, memory_format=torch.contiguous_format),
        torch.empty_like(lse, memory_format=torch.contiguous_format),
    )


_merge_attention = define(
    "merge_attention(Tensor out, Tensor lse, Tensor out2, Tensor lse2) -> (Tensor, Tensor)", _merge_attention_fake
)
