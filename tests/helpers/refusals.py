"""What operators refuse: the form of cases, those of rings in E4M3, and of what exchanges and merges attention."""

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


def float8_cases() -> list[Case]:
    e4m3 = torch.float8_e4m3fn
    push, forecast, gram = "residual_push_float8", "residual_forecast_float8", "ring_gram_float8"
    four, ring, scales = [x(3, 4)], [x(2, 3, 4, dtype=e4m3)], [x(2, 3)]
    table = [
        Case(push, ([], [], [], 0, []), "before must have at least one tensor, got an empty list"),
        Case(push, (four, four, [], 0, []), "ring must have as many tensors as before, 1, got 0"),
        Case(push, (four, four, ring, 2, scales), "slot must be in [0, 2), got 2"),
        Case(push, (four, four, ring, torch.tensor(-1), scales), "slot must be in [0, 2), got -1", True),
        Case(push, (four, four, ring, torch.tensor(1.0), scales), "slot must be one integer, got float32 of shape ()"),
        Case(forecast, (four, ring, [1.0], 1.0, scales), "weights must have one value per ring slot, 2, got 1"),
        Case(forecast, (four, ring, x(3), 1.0, scales), "weights must have the shape (2,) or (batch, 2), got (3,)"),
        Case(gram, ([], None, False, []), "ring must have at least one tensor, got an empty list"),
        Case(gram, ([x(2, 4)], None, False, [x(2)]), "ring[0] must be float8_e4m3fn, got float32"),
        Case(
            gram,
            ([*ring, ring[0].to("meta")], None, False, scales * 2),
            "ring[1] must be on the device of ring[0], cpu, got meta",
        ),
        Case(gram, (ring, [0, 2], False, scales), "slots[1] must be in [0, 2), got 2"),
        Case(gram, ([x(2, 4, dtype=e4m3), *ring], None, True, [x(2), *scales]), BATCHES),
    ]
    transposed = x(2, 4, 3, dtype=e4m3).transpose(1, 2)
    for op, first, before in ((push, "before", (four, four)), (forecast, "hidden", (four,))):
        rest = 0 if op == push else [1.0, 2.0]
        between = (rest,) if op == push else (rest, 1.0)
        table += [
            Case(op, (*before, [x(2, 3, 4)], *between, scales), "ring[0] must be float8_e4m3fn, got float32"),
            Case(
                op,
                (*before, [x(2, 3, 4, dtype=e4m3, device="meta")], *between, scales),
                f"ring[0] must be on the device of {first}[0], cpu, got meta",
            ),
            Case(
                op,
                (*before, [x(2, 3, 5, dtype=e4m3)], *between, scales),
                f"ring[0] must have the shape of {first}[0], (3, 4), behind its slots, got (2, 3, 5)",
            ),
        ]
    one, numbers = x(), [x(2, dtype=e4m3)]
    calls = (
        (push, lambda r, s: (four, four, r, 0, s)),
        (forecast, lambda r, s: (four, r, [1.0, 2.0], 1.0, s)),
        (gram, lambda r, s: (r, None, False, s)),
    )
    for op, call in calls:
        table += [
            Case(op, call(ring, []), "scales must have as many tensors as ring, 1, got 0"),
            Case(op, call(ring, [x(2, 3, dtype=torch.float16)]), "scales[0] must be float32, got float16"),
            Case(
                op,
                call(ring, [x(2, 3, device="meta")]),
                "scales[0] must be on the device of ring[0], cpu, got meta",
            ),
            Case(
                op,
                call(ring, [x(2, 3, 1)]),
                "scales[0] must have the shape of ring[0] without its last dimension, (2, 3), got (2, 3, 1)",
            ),
            Case(op, call([transposed], scales), f"ring[0] {WITHIN}, got strides (12, 1, 3)"),
            Case(op, call(ring, [x(3, 2).mT]), f"scales[0] {WITHIN}, got strides (1, 2)"),
            Case(
                op, call(ring, [x(3).expand(2, 3)]), "scales[0] must have slots that do not overlap, got strides (0, 1)"
            ),
        ]
    no_rows = "ring[0] must have rows to scale, a dimension behind its slots, got shape (2,)"
    table += [
        Case(push, ([one], [one], numbers, 0, [one]), no_rows),
        Case(forecast, ([one], numbers, [1.0, 2.0], 1.0, [one]), no_rows),
        Case(gram, (numbers, None, False, [one]), no_rows),
    ]
    memory = torch.ones(40)
    codes, shared = memory[:6].view(e4m3).view(2, 3, 4), memory[4:10].view(2, 3)
    table += [
        Case(push, ([memory[:12].view(3, 4)], four, [codes], 0, scales), f"ring[0] {SHARED} before[0]", True),
        Case(push, (four, [memory[8:20].view(3, 4)], ring, 0, [shared]), f"scales[0] {SHARED} after[0]", True),
        Case(push, (four, four, [codes], 0, [shared]), f"scales[0] {SHARED} ring[0]", True),
        Case(push, (four * 2, four * 2, ring * 2, 0, [x(2, 3), x(2, 3)]), f"ring[1] {SHARED} ring[0]", True),
    ]
    return table


BATCHES = "ring[1] must have the batch size of ring[0], 4, got 3"
WITHIN = "must be contiguous within each slot"
SHARED = "must not share memory with"


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
