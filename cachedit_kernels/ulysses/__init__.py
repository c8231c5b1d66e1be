"""Ulysses sequence parallelism: `ulysses_pack`, `ulysses_unpack` and the exchanges made of them."""

from cachedit_kernels.ulysses.op import Quantized, ulysses_pack, ulysses_unpack

__all__ = ["Quantized", "ulysses_pack", "ulysses_unpack"]
