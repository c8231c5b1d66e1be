"""What operators refuse: the cases' form, and those of the operators that exchange and merge attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    op: str
    arguments: tuple[Any, ...]
    message: str  # without the operator's name
    needs_values: bool = False  # not seen by a fake, which has no values and no memory


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def exchange_cases() -> list[Case]:
    half, double, ints = torch.float16, torch.float64, torch.int64
    table = []
    merge, out, lse = "merge_attention", x(2, 8, 3, 16), x(2, 8, 3)
    table += [
        Case(merge, (x(1, 2, 3, 4, dtype=ints), lse, out, lse), "out must be float32, float16 or bfloat16, got int64"),
        Case(merge, (lse, lse, lse, lse), "out must have the shape (batch, length, heads, head_dim), got (2, 8, 3)"),
        Case(merge, (out, lse, out.to("meta"), lse), "out2 must be on the device of out, cpu, got meta"),
        Case(merge, (out.half(), lse, out, lse), "out2 must be float16, as out is, got float32"),
        Case(merge, (out, lse, out.double(), lse), "out2 must be float32, float16 or bfloat16, got float64"),
        Case(
            merge,
            (out, lse, x(2, 8, 3, 8), lse),
            "out2 must have the shape of out, (2, 8, 3, 16), got (2, 8, 3, 8)",
        ),
        Case(merge, (out, lse.to("meta"), out, lse), "lse must be on the device of out, cpu, got meta"),
        Case(merge, (out, lse.half(), out, lse), "lse must be float32, got float16"),
        Case(merge, (out, lse, out, x(2, 3, 8)), "lse2 must have the shape (2, 8, 3), got (2, 3, 8)"),
        Case(merge, (out, lse, out, x(2, 8, 3, 1)), "lse2 must have the shape (2, 8, 3), got (2, 8, 3, 1)"),
    ]

    pack, three, halves = "ulysses_pack", [x(2, 8, 6, 16)] * 3, [True, False, True]
    table += [
        Case(pack, ([], [], 2, []), "tensors must have at least one tensor, got an empty list"),
        Case(
            pack,
            ([x(8, 6, 16)], [6], 2, [True]),
            "tensors[0] must have the shape (batch, length, heads, head_dim), got (8, 6, 16)",
        ),
        Case(
            pack,
            ([x(2, 8, 6, 16, dtype=double)], [6], 2, [True]),
            "tensors[0] must be float32, float16 or bfloat16, got float64",
        ),
        Case(
            pack,
            ([*three, x(2, 8, 6, 16, device="meta")], [6], 2, [True] * 4),
            "tensors[3] must be on the device of tensors[0], cpu, got meta",
        ),
        Case(
            pack,
            ([*three, x(2, 8, 6, 16, dtype=half)], [6], 2, [True] * 4),
            "tensors[3] must have the dtype of tensors[0], float32, got float16",
        ),
        Case(
            pack,
            ([*three, x(2, 9, 6, 16)], [6], 2, [True] * 4),
            "tensors[3] must have the shape of tensors[0], (2, 8, 6, 16), got (2, 9, 6, 16)",
        ),
        Case(pack, (three, [6], 2, [True]), "float8 must have one value per tensor, 3, got 1"),
        Case(pack, (three, [6], 3, halves), "scatter_dim must be 1 (sequence) or 2 (heads), got 3"),
        Case(pack, (three, [6], -1, halves), "scatter_dim must be 1 (sequence) or 2 (heads), got -1"),
        Case(pack, (three, [3, 2], 2, halves), "splits must be sizes that add up to 6, dimension 2, got (3, 2)"),
        Case(pack, (three, [9, -1], 1, halves), "splits must be sizes that add up to 8, dimension 1, got (9, -1)"),
        Case(pack, (three, [], 2, halves), "splits must be sizes that add up to 6, dimension 2, got ()"),
    ]

    unpack, shape, buffer = "ulysses_unpack", [1, 2, 3, 16], x(192, dtype=torch.uint8)
    table += [
        Case(
            unpack,
            (x(192), shape, [2], 1, torch.float16, [False], True),
            "buffer must be contiguous uint8 of one dimension, got float32 of shape (192,) and strides (1,)",
        ),
        Case(
            unpack,
            (buffer.view(96, 2)[:, 0], shape, [2], 1, torch.float16, [False], True),
            "buffer must be contiguous uint8 of one dimension, got uint8 of shape (96,) and strides (2,)",
        ),
        Case(
            unpack,
            (buffer.view(96, 2), shape, [2], 1, torch.float16, [False], True),
            "buffer must be contiguous uint8 of one dimension, got uint8 of shape (96, 2) and strides (2, 1)",
        ),
        Case(
            unpack,
            (buffer, shape, [2], 1, double, [False], True),
            "dtype must be float32, float16 or bfloat16, got float64",
        ),
        Case(
            unpack,
            (buffer, [2, 3, 16], [2], 1, half, [False], True),
            "shape must be (batch, length, heads, head_dim), got (2, 3, 16)",
        ),
        Case(
            unpack,
            (buffer, [1, 2, 3, -16], [2], 1, half, [False], True),
            "shape must be (batch, length, heads, head_dim), got (1, 2, 3, -16)",
        ),
        Case(
            unpack,
            (buffer, shape, [2], 0, half, [False], True),
            "gather_dim must be 1 (sequence) or 2 (heads), got 0",
        ),
        Case(
            unpack,
            (buffer, shape, [2, 2], 2, half, [False], True),
            "splits must be sizes that add up to 3, dimension 2, got (2, 2)",
        ),
        Case(unpack, (buffer, shape, [2], 1, half, [True], True), "buffer must have 128 bytes, got 192"),
        Case(unpack, (buffer, shape, [1, 1], 1, half, [True, True], False), "buffer must have 256 bytes, got 192"),
    ]
    return table
