"""The operators as torch sees them: schemas, fakes, functionalization, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cachedit_kernels
from cachedit_kernels import _backend
from operands import make

OPS = torch.ops.cachedit


def streams(seed: int, *leading: int) -> list[Tensor]:
    return [
        make((*leading, 2, 8, 16), torch.float32, "contiguous", seed),
        make((*leading, 2, 5), torch.bfloat16, "contiguous", seed),
    ]


def attention(seed: int) -> Tensor:
    return make((2, 8, 3, 16), torch.float32, "transposed", seed)


LSE = torch.zeros(2, 8, 3)
QKV = [True, False, True]
PACKED = [2, 8, 3, 16], [2, 1], 2, torch.float32, QKV


def packed() -> Tensor:
    return cachedit_kernels.ulysses_pack([attention(s) for s in range(3)], [2, 1], 2, QKV)


def float8(seed: int, slots: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    wide = streams(seed, slots)
    return [ring.to(torch.float8_e4m3fn) for ring in wide], [ring[..., 0].float().contiguous() for ring in wide]


CALLS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "residual_l1": (OPS.residual_l1.default, lambda: (streams(0), streams(1), streams(2))),
    "residual_l1 per sample": (OPS.residual_l1.default, lambda: (streams(0), streams(1), streams(2), True)),
    "l1": (OPS.l1.default, lambda: (streams(0), streams(1))),
    "l1 per sample": (OPS.l1.default, lambda: (streams(0), streams(1), True)),
    "residual_push": (OPS.residual_push.default, lambda: (streams(0), streams(1), streams(2, 3), torch.tensor(1))),
    "residual_push.int": (OPS.residual_push.int, lambda: (streams(0), streams(1), streams(2, 3), 1)),
    "residual_forecast": (
        OPS.residual_forecast.default,
        lambda: (streams(0), streams(1, 2), torch.tensor([2.0, -1.0])),
    ),
    "residual_forecast per sample": (
        OPS.residual_forecast.default,
        lambda: (streams(0), streams(1, 2), torch.ones(2, 2)),
    ),
    "residual_forecast.floats": (OPS.residual_forecast.floats, lambda: (streams(0), streams(1, 2), [2.0, -1.0], 0.5)),
    "ring_gram": (OPS.ring_gram.default, lambda: (streams(0, 3),)),
    "ring_gram of some slots": (OPS.ring_gram.default, lambda: (streams(0, 3), [2, 0])),
    "ring_gram per sample": (OPS.ring_gram.default, lambda: (streams(0, 3), None, True)),
    "residual_push_float8": (
        OPS.residual_push_float8.default,
        lambda: (streams(0), streams(1), float8(2)[0], torch.tensor(1), float8(2)[1]),
    ),
    "residual_push_float8.int": (
        OPS.residual_push_float8.int,
        lambda: (streams(0), streams(1), float8(2)[0], 1, float8(2)[1]),
    ),
    "residual_forecast_float8": (
        OPS.residual_forecast_float8.default,
        lambda: (streams(0), float8(1)[0], torch.tensor([2.0, -1.0, 0.5]), 1.0, float8(1)[1]),
    ),
    "residual_forecast_float8.floats": (
        OPS.residual_forecast_float8.floats,
        lambda: (streams(0), float8(1)[0], [2.0, -1.0, 0.5], 1.0, float8(1)[1]),
    ),
    "ring_gram_float8": (
        OPS.ring_gram_float8.default,
        lambda: (float8(0)[0], [2, 0], True, float8(0)[1]),
    ),
    "merge_attention": (OPS.merge_attention.default, lambda: (attention(0), attention(1)[..., 0], attention(2), LSE)),
    "ulysses_pack": (OPS.ulysses_pack.default, lambda: ([attention(s) for s in range(3)], [2, 1], 2, QKV)),
    "ulysses_pack O": (OPS.ulysses_pack.default, lambda: ([attention(0)], [5, 3, 0], 1, [True])),
    "ulysses_unpack": (OPS.ulysses_unpack.default, lambda: (packed(), *PACKED)),
    "ulysses_unpack quantised": (OPS.ulysses_unpack.default, lambda: (packed(), *PACKED, False)),
}
each_call = pytest.mark.parametrize("operator, arguments", CALLS.values(), ids=CALLS)


@each_call
def test_opcheck(operator: Any, arguments: Callable[[], tuple[Any, ...]]) -> None:
    if "float8" in operator.name():
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, arguments(), test_utils=checks)
    else:
        torch.library.opcheck(operator, arguments())


@pytest.mark.parametrize("operator, arguments", [call for name, call in CALLS.items() if "float8" in name])
def test_float8_operators_write_what_their_schema_says(operator: Any, arguments: Callable[[], tuple[Any, ...]]) -> None:
    """In place of opcheck's test_schema, which multiplies arguments; torch multiplies nothing in E4M3."""
    given, original = arguments(), arguments()
    operator(*given)
    for argument, value, before in zip(operator._schema.arguments, given, original):
        for now, then in zip(*map(torch.utils._pytree.tree_leaves, (value, before))):
            if isinstance(now, Tensor):
                written = not torch.equal(now.float(), then.float())
                assert written == (argument.alias_info is not None and argument.alias_info.is_write), argument.name


def test_every_overload_is_opchecked() -> None:
    tested = {operator.name() for operator, _ in CALLS.values()}
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cachedit::")}
    listed = {f"cachedit::{o}" for operator in _backend.OPERATORS.values() for o in operator.overloads}
    assert tested == listed and listed <= defined


@each_call
def test_fake_results_look_like_real_ones(operator: Any, arguments: Callable[[], tuple[Any, ...]]) -> None:
    real = operator(*arguments())
    with FakeTensorMode() as mode:
        fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments()))
    assert isinstance(real, Tensor) or type(real) is type(fake)
    for r, f in zip(*map(torch.utils._pytree.tree_leaves, (real, fake))):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype) if r is not None else f is None


@each_call
def test_meta_tensors(operator: Any, arguments: Callable[[], tuple[Any, ...]]) -> None:
    meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments())
    for result in torch.utils._pytree.tree_leaves(operator(*meta)):
        assert result is None or result.is_meta


def test_a_step_compiles_into_one_graph() -> None:
    """All operators in one function, fullgraph: same results, the ring written in place, no recompilation."""

    def step(before: Tensor, after: Tensor, ring: Tensor, slot: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        residual = after.sin() - before
        sums = cachedit_kernels.residual_l1([before, before], [after.sin(), after], [residual, ring[0]], True)
        cachedit_kernels.residual_push([before * 1], [after + 1], [ring], slot)
        (out,) = cachedit_kernels.residual_forecast([before], [ring], weights)
        gram = cachedit_kernels.ring_gram([ring, ring], [2, 0])
        return sums, out + cachedit_kernels.l1([before], [after])[0, 0] + gram[1, 0, 1]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for slot in range(3):
        before, after = (make((2, 8, 16), torch.float32, "contiguous", seed + slot) for seed in range(2))
        rings = [make((3, 2, 8, 16), torch.float32, "contiguous", 9) for _ in range(2)]
        slots, weights = torch.tensor(slot), torch.tensor([1.0, slot, 2.0])
        expected = step(before, after, rings[0], slots, weights)
        with torch.compiler.set_stance("fail_on_recompile" if slot else "default"):
            got = compiled(before, after, rings[1], slots, weights)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(rings[1], rings[0])


def test_a_step_in_e4m3_compiles_into_one_graph() -> None:
    def step(before: Tensor, after: Tensor, ring: Tensor, scales: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
        cachedit_kernels.residual_push([before * 1], [after + 1], [ring], slot, [scales])
        (out,) = cachedit_kernels.residual_forecast([before], [ring], weights, scales=[scales])
        return out + cachedit_kernels.ring_gram([ring], [1, 0], scales=[scales])[0, 0, 1]

    torch._dynamo.reset()
    before, after = (make((2, 8, 16), torch.float32, "contiguous", seed) for seed in range(2))
    codes, scales = torch.zeros((2, 3, 2, 8, 16)).to(torch.float8_e4m3fn), torch.ones(2, 3, 2, 8)
    operands = torch.tensor(1), torch.tensor([1.0, 0.5, 2.0])
    expected = step(before, after, codes[0], scales[0], *operands)
    got = torch.compile(step, fullgraph=True)(before, after, codes[1], scales[1], *operands)
    torch.testing.assert_close(got, expected)
    assert torch.equal(codes[0].float(), codes[1].float()) and torch.equal(scales[0], scales[1])


def test_an_exchange_compiles_for_any_length() -> None:
    def exchange(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        length = q.shape[1]
        buffer = cachedit_kernels.ulysses_pack([q, k * 2, v], [2, 1], 2, QKV)
        shape = (2, length, 3, 16)
        q, k, v = cachedit_kernels.ulysses_unpack(buffer, shape, [2, 1], 2, torch.float32, QKV)
        lse = q[..., 0]
        return [*cachedit_kernels.merge_attention(q, lse, k + v, lse * 2)]

    torch._dynamo.reset()
    compiled = torch.compile(exchange, fullgraph=True, dynamic=True)
    for length in (8, 11):
        tensors = [make((2, length, 3, 16), torch.float32, "contiguous", seed) for seed in range(3)]
        with torch.compiler.set_stance("fail_on_recompile" if length > 8 else "default"):
            torch.testing.assert_close(compiled(*tensors), exchange(*tensors))


def test_inference_mode_writes_into_a_ring_made_outside_it() -> None:
    ring = torch.zeros(1, 3)
    with torch.inference_mode():
        cachedit_kernels.residual_push([torch.zeros(3)], [torch.ones(3)], [ring], 0)
    assert ring.tolist() == [[1.0] * 3]


def test_inputs_that_require_grad_give_values() -> None:
    x = torch.ones(3, requires_grad=True)
    assert cachedit_kernels.residual_l1([x], [x * 3], [x]).tolist() == [[3.0, 3.0]]
