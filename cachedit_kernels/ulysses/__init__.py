"""Ulysses sequence parallelism: `ulysses_pack`, `ulysses_unpack` and the exchanges made of them."""

from cachedit_kernels.ulysses.exchange import (
    Exchange,
    begin_scatter_heads,
    begin_scatter_sequence,
    quantized_all_to_all,
    quantized_all_to_all_output,
)
from cachedit_kernels.ulysses.op import Quantized, ulysses_pack, ulysses_unpack

__all__ = [
    "Exchange",
    "Quantized",
    "begin_scatter_heads",
    "begin_scatter_sequence",
    "quantized_all_to_all",
    "quantized_all_to_all_output",
    "ulysses_pack",
    "ulysses_unpack",
]
