"""Inner products between ring slots: `ring_gram`."""

from cachedit_kernels.gram.op import ring_gram

__all__ = ["ring_gram"]
