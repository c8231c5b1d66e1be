"""Merging partial attention results: `merge_attention`."""

from cachedit_kernels.attention.op import merge_attention

__all__ = ["merge_attention"]
