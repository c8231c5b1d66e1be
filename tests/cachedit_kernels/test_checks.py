"""Bad arguments: one table for the C++ operators, the checks in Python and the fakes, which agree word by word."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cachedit_kernels
from cachedit_kernels import _checks
from refusals import Case, exchange_cases, float8_cases, x


def overlapping() -> tuple[Tensor, Tensor]:
    """A ring of two slots of four, and a tensor in the same memory."""
    memory = torch.ones(20)
    return memory[:8].view(2, 4), memory[6:10]


def cases() -> list[Case]:
    half, double, ints = torch.float16, torch.float64, torch.int64
    ring, alias = overlapping()
    streams = [x(2, 8, 64), x(2, 4, 64)]
    table = []

    for op, names, rest in (
        ("residual_l1", ("before", "after", "anchor"), (False,)),
        ("l1", ("previous", "current"), (False,)),
        ("residual_push", ("before", "after"), ([x(3, 2, 8, 64), x(3, 2, 4, 64)], 0)),
    ):
        first, last = names[0], names[-1]
        count = len(names)

        def lists(final: list[Tensor], count: int = count, rest: tuple[Any, ...] = rest) -> tuple[Any, ...]:
            return (*[streams] * (count - 1), final, *rest)

        def all_lists(each: list[Tensor], count: int = count, rest: tuple[Any, ...] = rest) -> tuple[Any, ...]:
            return (*[each] * count, *rest)

        table += [
            Case(op, all_lists([]), f"{first} must have at least one tensor, got an empty list"),
            Case(op, lists([x(2, 8, 64)]), f"{last} must have as many tensors as {first}, 2, got 1"),
            Case(
                op,
                lists([x(2, 8, 64), x(2, 8, 32)]),
                f"{last}[1] must have the shape of {first}[1], (2, 4, 64), got (2, 8, 32)",
            ),
            Case(
                op,
                lists([x(8), x(2, 4, 64)]),
                f"{last}[0] must have the shape of {first}[0], (2, 8, 64), got (8,)",
            ),
            Case(
                op,
                lists([x(2, 8, 64), x(2, 4, 64, dtype=half)]),
                f"{last}[1] must have the dtype of {first}[1], float32, got float16",
            ),
            Case(
                op,
                all_lists([x(2, 8, 64, dtype=double)]),
                f"{first}[0] must be float32, float16 or bfloat16, got float64",
            ),
            Case(
                op,
                all_lists([x(2, 8, 64), x(3, dtype=ints)]),
                f"{first}[1] must be float32, float16 or bfloat16, got int64",
            ),
            Case(
                op,
                lists([x(2, 8, 64), x(2, 4, 64, device="meta")]),
                f"{last}[1] must be on the device of {first}[0], cpu, got meta",
            ),
        ]
        if op != "residual_push":
            sampled = (True,)
            table += [
                Case(
                    op,
                    (*[[x(2, 3), x()]] * count, *sampled),
                    f"{first}[1] must have a batch dimension for per_sample, got shape ()",
                ),
                Case(
                    op,
                    (*[[x(2, 3), x(3, 2)]] * count, *sampled),
                    f"{first}[1] must have the batch size of {first}[0], 2, got 3",
                ),
            ]

    push, four, rings = "residual_push", [x(4)], [x(2, 4)]
    table += [
        Case(push, (four, four, [], 0), "ring must have as many tensors as before, 1, got 0"),
        Case(
            push,
            (four, four, [x(2, 4, dtype=half)], 0),
            "ring[0] must have the dtype of before[0], float32, got float16",
        ),
        Case(
            push, (four, four, [x(2, 4, device="meta")], 0), "ring[0] must be on the device of before[0], cpu, got meta"
        ),
        Case(
            push,
            (four, four, [x(4)], 0),
            "ring[0] must have the shape of before[0], (4,), behind its slots, got (4,)",
        ),
        Case(
            push,
            (four, four, [x(2, 5)], 0),
            "ring[0] must have the shape of before[0], (4,), behind its slots, got (2, 5)",
        ),
        Case(push, (four * 2, four * 2, [x(2, 4), x(3, 4)], 0), "ring[1] must have as many slots as ring[0], 2, got 3"),
        Case(
            push,
            ([x(3, 4)], [x(3, 4)], [x(2, 4, 3).transpose(1, 2)], 0),
            "ring[0] must be contiguous within each slot, got strides (12, 1, 3)",
        ),
        Case(
            push, (four, four, [x(1, 8)[:, ::2]], 0), "ring[0] must be contiguous within each slot, got strides (8, 2)"
        ),
        Case(
            push,
            (four, four, [x(4).expand(2, 4)], 0),
            "ring[0] must have slots that do not overlap, got strides (0, 1)",
        ),
        Case(push, (four, four, rings, 2), "slot must be in [0, 2), got 2"),
        Case(push, (four, four, rings, -1), "slot must be in [0, 2), got -1"),
        Case(push, (four, four, [x(0, 4)], 0), "slot must be in [0, 0), got 0"),
        Case(push, (four, four, rings, torch.tensor(2)), "slot must be in [0, 2), got 2", True),
        Case(push, (four, four, rings, torch.tensor([-1], dtype=torch.int16)), "slot must be in [0, 2), got -1", True),
        Case(push, (four, four, rings, torch.tensor([0, 1])), "slot must be one integer, got int64 of shape (2,)"),
        Case(push, (four, four, rings, torch.tensor(1.0)), "slot must be one integer, got float32 of shape ()"),
        Case(push, (four, four, rings, torch.tensor(True)), "slot must be one integer, got bool of shape ()"),
        Case(
            push,
            (four, four, rings, torch.tensor(0, device="meta")),
            "slot must be on the device of before[0], cpu, got meta",
        ),
        Case(push, ([alias], four, [ring], 0), "ring[0] must not share memory with before[0]", True),
        Case(push, (four, [alias], [ring], 1), "ring[0] must not share memory with after[0]", True),
        Case(push, (four, [ring[1]], [ring], 0), "ring[0] must not share memory with after[0]", True),
        Case(push, (four * 2, four * 2, [ring, ring], 0), "ring[1] must not share memory with ring[0]", True),
        Case(
            push,
            (four * 2, [x(4), ring[0].expand(4)[:4]], [x(2, 4), ring], 0),
            "ring[1] must not share memory with after[1]",
            True,
        ),
    ]

    forecast, weights = "residual_forecast", [1.0, 2.0]
    table += [
        Case(forecast, ([], [], weights, 1.0), "hidden must have at least one tensor, got an empty list"),
        Case(forecast, (four, rings * 2, weights, 1.0), "ring must have as many tensors as hidden, 1, got 2"),
        Case(
            forecast,
            ([x(4, dtype=double)], rings, weights, 1.0),
            "hidden[0] must be float32, float16 or bfloat16, got float64",
        ),
        Case(
            forecast,
            (four, [x(2, 4, dtype=half)], weights, 1.0),
            "ring[0] must have the dtype of hidden[0], float32, got float16",
        ),
        Case(
            forecast,
            (four, [x(2, 3)], weights, 1.0),
            "ring[0] must have the shape of hidden[0], (4,), behind its slots, got (2, 3)",
        ),
        Case(
            forecast,
            (four * 2, [x(2, 4), x(1, 4)], weights, 1.0),
            "ring[1] must have as many slots as ring[0], 2, got 1",
        ),
        Case(forecast, (four, rings, [1.0], 1.0), "weights must have one value per ring slot, 2, got 1"),
        Case(forecast, (four, rings, x(2, dtype=double), 1.0), "weights must be float32, got float64"),
        Case(
            forecast,
            (four, rings, x(2, device="meta"), 1.0),
            "weights must be on the device of hidden[0], cpu, got meta",
        ),
        Case(forecast, (four, rings, x(3), 1.0), "weights must have the shape (2,) or (batch, 2), got (3,)"),
        Case(forecast, (four, rings, x(), 1.0), "weights must have the shape (2,) or (batch, 2), got ()"),
        Case(forecast, (four, rings, x(1, 4, 2), 1.0), "weights must have the shape (2,) or (batch, 2), got (1, 4, 2)"),
        Case(
            forecast,
            (four, rings, x(3, 2), 1.0),
            "hidden[0] must have the batch size of weights, 3, in dimension 0, got shape (4,)",
        ),
        Case(
            forecast,
            ([x()], [x(2)], x(1, 2), 1.0),
            "hidden[0] must have the batch size of weights, 1, in dimension 0, got shape ()",
        ),
    ]
    gram, two = "ring_gram", [x(2, 4)]
    table += [
        Case(gram, ([], None, False), "ring must have at least one tensor, got an empty list"),
        Case(gram, ([x(2, dtype=double)], None, False), "ring[0] must be float32, float16 or bfloat16, got float64"),
        Case(
            gram, ([x(2), x(2, device="meta")], None, False), "ring[1] must be on the device of ring[0], cpu, got meta"
        ),
        Case(gram, ([x()], None, False), "ring[0] must have a slot dimension, got shape ()"),
        Case(
            gram,
            ([*two, x(2)], None, True),
            "ring[1] must have a slot and a batch dimension for per_sample, got shape (2,)",
        ),
        Case(gram, ([*two, x(3, 4)], None, False), "ring[1] must have as many slots as ring[0], 2, got 3"),
        Case(gram, ([*two, x(2, 3)], None, True), "ring[1] must have the batch size of ring[0], 4, got 3"),
        Case(gram, (two, [0, 2], False), "slots[1] must be in [0, 2), got 2"),
        Case(gram, (two, [-1], False), "slots[0] must be in [0, 2), got -1"),
        Case(gram, ([x(17, 2)], None, False), "at most 16 slots can be multiplied at once, got 17"),
        Case(gram, (two, [0] * 17, False), "at most 16 slots can be multiplied at once, got 17"),
    ]
    return table


CASES = cases() + float8_cases() + exchange_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.op}" for i, case in enumerate(CASES)])


def refusal(call: Callable[..., Any], case: Case) -> str:
    with pytest.raises(RuntimeError) as caught:
        call(*case.arguments)
    return str(caught.value)


@each_case
def test_operator(case: Case) -> None:
    """Some mixtures of devices are dispatched to the fake, for meta tensors; the words are the same."""
    assert refusal(getattr(cachedit_kernels, case.op.removesuffix("_float8")), case) == f"{case.op}: {case.message}"


@each_case
def test_checks_in_python(case: Case) -> None:
    assert refusal(getattr(_checks, case.op), case) == f"{case.op}: {case.message}"


@pytest.mark.parametrize("case", [case for case in CASES if not case.needs_values], ids=lambda case: case.op)
def test_fake(case: Case) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, list):
                return [fake(v) for v in value]
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        message = refusal(getattr(_checks, case.op), case._replace(arguments=tuple(map(fake, case.arguments))))
    assert message == f"{case.op}: {case.message}"


def test_nothing_is_written_before_everything_is_checked() -> None:
    """The last stream is at fault; the first one's ring must be untouched."""
    good, bad = torch.full((2, 4), 7.0), torch.full((2, 5), 7.0)
    for slot in (0, torch.tensor(0)):
        with pytest.raises(RuntimeError):
            cachedit_kernels.residual_push([x(4), x(4)], [x(4), x(4)], [good, bad], slot)
    ring, alias = overlapping()
    ring.fill_(7)
    with pytest.raises(RuntimeError):
        cachedit_kernels.residual_push([x(4), x(4)], [x(4), alias], [good, ring], 0)
    codes, scales = (torch.full(shape, 2.0) for shape in ((2, 4), (2,)))
    codes = codes.to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError):
        cachedit_kernels.residual_push([x(4)] * 2, [x(4)] * 2, [codes, codes], 0, [scales, scales[:, None]])
    assert (codes.float() == 2).all() and (scales == 2).all()
    assert (good == 7).all() and (bad == 7).all() and (ring == 7).all()


def test_tensors_side_by_side_are_no_aliases() -> None:
    memory = torch.zeros(24)
    cachedit_kernels.residual_push([memory[:4]], [memory[20:]], [memory[4:20].view(4, 4)], 3)
    _checks.residual_push([memory[:4]], [memory[20:]], [memory[4:20].view(4, 4)], 3)


def test_a_tensor_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"List\[Tensor\]"):
        cachedit_kernels.l1(x(2, 3), x(2, 3))


def test_nan_weights_are_not_refused() -> None:
    assert cachedit_kernels.residual_forecast([x(1)], [x(1, 1)], [math.nan])[0].isnan().all()


@pytest.mark.parametrize("position", range(4))
def test_none_is_no_tensor(position: int) -> None:
    arguments: list[Any] = [x(1, 2, 3, 4), x(1, 2, 3), x(1, 2, 3, 4), x(1, 2, 3)]
    arguments[position] = None
    name = ("out", "lse", "out2", "lse2")[position]
    with pytest.raises(RuntimeError, match=f"^merge_attention: {name} must be a tensor, got NoneType$"):
        cachedit_kernels.merge_attention(*arguments)


def test_the_exchanges_take_tensors() -> None:
    with pytest.raises(RuntimeError, match=r"^quantized_all_to_all: k must be a tensor, got list$"):
        cachedit_kernels.quantized_all_to_all(x(1, 2, 3, 4), [], x(1, 2, 3, 4))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"^quantized_all_to_all_output: o must be a tensor, got NoneType$"):
        cachedit_kernels.quantized_all_to_all_output(None)  # type: ignore[arg-type]
