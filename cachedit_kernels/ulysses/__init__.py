"""Ulysses sequence parallelism: `ulysses_pack`, `ulysses_unpack` and the exchanges made of them."""

from cachedit_kernels.ulysses.exchange import (
    Exchange,
    begin_scatter_heads,
    begin_scatter_sequence,
    quantized_all_to_all,
    quantized_all_to_all_output,
)
from cachedit_kernels.ulysses.op import Quantized, ulysses_pack, ulysses_unpack
from cachedit_kernels.ulysses.transport import Transport, transport

__all__ = [
    "Exchange",
    "Quantized",
    "Transport",
    "begin_scatter_heads",
    "begin_scatter_sequence",
    "quantized_all_to_all",
    "quantized_all_to_all_output",
    "transport",
    "ulysses_pack",
    "ulysses_unpack",
]
