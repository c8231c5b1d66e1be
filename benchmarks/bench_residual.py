"""residual_l1, l1, residual_push (E4M3 too) against eager torch, torch.compile, a peer and a copy of the same bytes.

K of residual_push is what a forecast of order K - 1 needs: one ring slot written here, a ladder of K differences there.

    python benchmarks/bench_residual.py --mb 1 16 64 256 --dtype bfloat16 float32
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import cachedit_kernels
from common import Case, run_sizes


def cases(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    before, after, anchor = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    ring = torch.zeros((3, *shape), dtype=dtype, device=device)

    def eager_residual_l1() -> Tensor:
        return ((after - before) - anchor).abs().mean() / anchor.abs().mean()

    def eager_l1() -> Tensor:
        return (before - after).abs().mean() / before.abs().mean()

    similarity = peer_similarity()
    yield Case(
        "residual_l1",
        dtype,
        {},
        3 * before.nbytes,
        lambda: cachedit_kernels.residual_l1([before], [after], [anchor]),
        eager_residual_l1,
        similarity and (lambda: similarity(anchor, after - before)),
    )
    yield Case(
        "l1",
        dtype,
        {},
        2 * before.nbytes,
        lambda: cachedit_kernels.l1([before], [after]),
        eager_l1,
        similarity and (lambda: similarity(before, after)),
    )
    for k in (1, 2, 3):
        yield Case(
            "residual_push",
            dtype,
            {"k": k},
            3 * before.nbytes,
            lambda: cachedit_kernels.residual_push([before], [after], [ring], 1),
            ladder_update(before, after, k),
            peer_update(before, after, k),
        )
    codes, scales = ring.to(torch.float8_e4m3fn), ring[..., 0].float().contiguous()
    yield Case(
        "residual_push_float8",
        dtype,
        {},
        2 * before.nbytes + codes[0].nbytes + scales[0].nbytes,
        lambda: cachedit_kernels.residual_push([before], [after], [codes], 1, [scales]),
        lambda: quantise(after - before),
    )


def quantise(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in E4M3 with a scale each."""
    scale = residual.float().abs().amax(-1, keepdim=True) / 448
    return (residual / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def ladder_update(before: Tensor, after: Tensor, k: int, gap: float = 2.0) -> Callable[[], list[Tensor]]:
    """What a derivative ladder does on a computed step: the new residual, then K - 1 divided differences."""
    previous = [torch.randn_like(before) for _ in range(k)]

    def update() -> list[Tensor]:
        ladder = [after - before]
        for i in range(k - 1):
            ladder.append((ladder[i] - previous[i]) / gap)
        return ladder

    return update


def peer_similarity() -> Callable[[Tensor, Tensor], object] | None:
    """cache_dit's decision, which ends with reading the result back to the host."""
    try:
        from cache_dit import DBCacheConfig
        from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

        manager = CachedContextManager("benchmark", persistent_context=True)
        manager.set_context(manager.new_context("benchmark", cache_config=DBCacheConfig(num_inference_steps=1 << 30)))
        manager.mark_step_begin()
        one = torch.ones(2)
        manager.similarity(one, one, threshold=0.1)
    except Exception as error:  # absent, or not the version that this was written for
        print(f"no peer for residual_l1 and l1: {error!r}")
        return None
    return lambda t1, t2: manager.similarity(t1, t2, threshold=0.1)


def peer_update(before: Tensor, after: Tensor, k: int) -> Callable[[], object] | None:
    """cache_dit's ladder with K - 1 derivatives, one computed step after another."""
    try:
        from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState
    except ImportError:
        return None
    state = TaylorSeerState(n_derivatives=k - 1)

    def update() -> None:
        state.mark_step_begin()
        state.update(after - before)

    for _ in range(4):  # until the ladder is full
        update()
    return update


if __name__ == "__main__":
    run_sizes(__doc__, cases)
