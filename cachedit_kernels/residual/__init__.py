"""Measuring and storing residuals: `residual_l1`, `l1` and `residual_push`."""

from cachedit_kernels.residual.op import l1, residual_l1, residual_push

__all__ = ["l1", "residual_l1", "residual_push"]
