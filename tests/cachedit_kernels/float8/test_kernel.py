"""The Triton kernels for rings in E4M3: values on a GPU or interpreted, and machine code."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from cachedit_kernels.float8.reference import from_e4m3, to_e4m3
from cachedit_kernels.forecast import kernel as forecast
from cachedit_kernels.forecast import reference
from cachedit_kernels.gram import kernel as gram
from cachedit_kernels.residual import kernel as residual
from cachedit_kernels.testing.aot import assert_lean, compiled_for_each_gpu, compiling_for
from cachedit_kernels.testing.devices import kernel_devices, not_interpreting, run_under_interpreter

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (37,), (5, 7), (2, 1, 16), (2, 33, 24), (1, 2, 3, 5, 7), (3, 7, 1025), (2, 2500), (2, 0, 8), (0, 4)]
on_each_device = pytest.mark.parametrize("device", kernel_devices())
for_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randoms(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(count)]


def empty(slots: int, shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """A ring of ones, and scales of 7."""
    ring = torch.ones((slots, *shape), device=device).to(E4M3)
    return ring, torch.full((slots, *shape[:-1]), 7.0, device=device)


def filled(slots: int, shape: tuple[int, ...], device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    codes, scales = to_e4m3(randoms(1, (slots, *shape), torch.float32, "cpu", seed)[0])
    return codes.to(device), scales.to(device)


def assert_pushed(ring: Tensor, scales: Tensor, slot: int, before: Tensor, after: Tensor) -> None:
    """To the bit, and nothing else was written."""
    codes, expected = to_e4m3(after.cpu().float() - before.cpu().float())
    assert torch.equal(ring[slot].cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scales[slot].cpu(), expected)
    others = [k for k in range(len(ring)) if k != slot]
    assert (ring.float()[others] == 1).all() and (scales[others] == 7).all()


def assert_forecast(got: Tensor, hidden: Tensor, ring: Tensor, scales: Tensor, weights: Tensor | list[float]) -> None:
    (expected,) = reference.residual_forecast_float8([hidden.double()], [ring], weights, 1.0, [scales])
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=3e-6 + eps * 1e-2)


@on_each_device
@for_each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, y = randoms(2, shape, dtype, device)
    ring, scales = empty(3, shape, device)
    residual.residual_push_float8([x], [y], [ring], 1, [scales])
    assert_pushed(ring, scales, 1, x, y)
    ring, scales = filled(3, shape, device)
    weights = [2.0, -1.0, 0.0]
    assert_forecast(forecast.residual_forecast_float8([x], [ring], weights, 1.0, [scales])[0], x, ring, scales, weights)
    rows = from_e4m3(ring, scales, torch.float64)[[2, 0]].flatten(1)
    got = gram.ring_gram_float8([ring], [2, 0], False, [scales])[0]
    torch.testing.assert_close(got.double(), rows @ rows.mT, rtol=1e-5, atol=1e-4)


@on_each_device
def test_streams_may_differ_in_shape_and_dtype(device: str) -> None:
    shapes = [(2, 70, 64), (2, 7, 24), (2, 0, 3), (2, 5), (2, 33, 3, 16), (2, 3, 1100)]
    hidden = [randoms(1, shape, DTYPES[s % 3], device, s)[0] for s, shape in enumerate(shapes)]
    after = [randoms(1, shape, DTYPES[s % 3], device, 9 + s)[0] for s, shape in enumerate(shapes)]
    rings, scales = map(list, zip(*(empty(2, shape, device) for shape in shapes), strict=True))
    residual.residual_push_float8(hidden, after, rings, torch.tensor(1, device=device), scales)
    for x, y, r, s in zip(hidden, after, rings, scales, strict=True):
        assert_pushed(r, s, 1, x, y)
    weights = torch.tensor([[2.0, -1.0], [0.0, 0.5]], device=device)
    for w in ([0.5, 0.0], weights[0], weights):
        for got, h, r, s in zip(
            forecast.residual_forecast_float8(hidden, rings, w, 1.0, scales), hidden, rings, scales, strict=True
        ):
            assert_forecast(got, h, r, s, w)
    grams = gram.ring_gram_float8(rings, None, True, scales)
    for got, r, s in zip(grams, rings, scales, strict=True):
        rows = from_e4m3(r, s, torch.float64).reshape(2, 2, -1 if r.numel() else 0).movedim(1, 0)
        torch.testing.assert_close(got.double(), rows @ rows.mT, rtol=1e-5, atol=1e-4)


@on_each_device
@pytest.mark.parametrize("layout", ["token slice", "every other column", "transposed"])
def test_strides_are_read_right(device: str, layout: str) -> None:
    x, y = randoms(2, (3, 45, 32), torch.bfloat16, device)
    if layout == "token slice":
        a, b = (t.new_full((3, 48, 32), math.nan)[:, 2:-1].copy_(t) for t in (x, y))
    elif layout == "every other column":
        a, b = (t.new_full((3, 45, 64), math.nan)[..., ::2].copy_(t) for t in (x, y))
    else:
        a, b = (t.new_empty((32, 45, 3)).permute(2, 1, 0).copy_(t) for t in (x, y))
    ring, scales = (t[1::2] for t in empty(6, x.shape, device))  # gaps between the slots
    residual.residual_push_float8([a], [b], [ring], 2, [scales])
    assert_pushed(ring, scales, 2, x, y)
    weights = torch.arange(9, dtype=torch.float32, device=device).view(3, 3) - 4
    for w in (weights, [1.0, 2.0, 3.0]):
        (got,) = forecast.residual_forecast_float8([a], [ring], w, 1.0, [scales])
        assert_forecast(got, x, ring, scales, w)
    rows = from_e4m3(ring, scales, torch.float64).flatten(1)
    got = gram.ring_gram_float8([ring], None, False, [scales])[0]
    torch.testing.assert_close(got.double(), rows @ rows.mT, rtol=1e-5, atol=1e-4)


@on_each_device
@pytest.mark.parametrize("seed", range(8))
def test_any_shape(device: str, seed: int) -> None:
    pick = random.Random(seed)
    shape = (*(pick.randint(0, 20) for _ in range(pick.randint(0, 3))), pick.choice([1, 3, 16, 31, 200, 1500]))
    x, y = randoms(2, shape, pick.choice(DTYPES), device, seed)
    ring, scales = empty(2, shape, device)
    residual.residual_push_float8([x], [y], [ring], 0, [scales])
    assert_pushed(ring, scales, 0, x, y)
    (got,) = forecast.residual_forecast_float8([x], [ring], [1.5, 0.0], 1.0, [scales])
    assert_forecast(got, x, ring, scales, [1.5, 0.0])


@on_each_device
def test_nothing_is_read_or_written_that_should_not_be(device: str) -> None:
    x, y = randoms(2, (2, 40), torch.float32, device)
    for slot in (-1, 3):
        storage, scales = empty(5, (2, 40), device)
        index = torch.tensor(slot, device=device)
        residual.residual_push_float8([x], [y], [storage[1:4]], index, [scales[1:4]])
        assert (storage.float() == 1).all() and (scales == 7).all()
    ring, scales = torch.full((2, 2, 40), math.nan, device=device).to(E4M3), torch.full((2, 2), math.nan, device=device)
    ring[1], scales[1] = 1.0, 2.0
    for weights in ([0.0, 3.0], torch.tensor([0.0, 3.0], device=device)):
        (got,) = forecast.residual_forecast_float8([x * math.nan], [ring], weights, 0.0, [scales])
        assert (got == 6).all()


@on_each_device
def test_nan_stays_where_it_is_and_an_infinity_spoils_its_row(device: str) -> None:
    x, y = torch.zeros(3, 70, device=device), torch.ones(3, 70, device=device)
    y[0, 69], y[1, 3] = math.nan, -math.inf
    ring, scales = empty(1, (3, 70), device)
    residual.residual_push_float8([x], [y], [ring], 0, [scales])
    (got,) = forecast.residual_forecast_float8([x], [ring], [1.0], 1.0, [scales])
    assert got[0].isnan().sum() == 1 and got[0, 69].isnan() and got[1].isnan().all() and (got[2] == 1).all()


@not_interpreting
def test_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@compiled_for_each_gpu
@for_each_dtype
@pytest.mark.parametrize("columns", [64, 3072])
def test_kernels_compile_to_wide_loads_and_stores(capability: int, dtype: torch.dtype, columns: int) -> None:
    x = [torch.empty((2, 128, columns), dtype=dtype)] * 2
    ring = [torch.empty((3, 2, 128, columns), dtype=E4M3)] * 2
    scales = [torch.empty((3, 2, 128))] * 2
    with compiling_for(capability) as binaries:
        residual.residual_push_float8(x, x, ring, 1, scales)
        residual.residual_push_float8(x, x, ring, torch.tensor(1), scales)
        forecast.residual_forecast_float8(x, ring, [2.0, -1.0, 0.5], 1.0, scales)
        forecast.residual_forecast_float8(x, ring, torch.ones(2, 3), 1.0, scales)
        gram.ring_gram_float8(ring, None, False, scales)
    *pushes, floats, tensors, products = binaries
    for push in pushes:
        assert_lean(push, registers=64)
        assert push.stores["128"] == 2 and set(push.stores) == {"128", "32"}  # codes, and a scale per row
        assert set(push.loads) <= {"128", "64"}  # 64: a slot that is a tensor
    vectors = dtype.itemsize  # 16 elements of a stream in each thread, their codes in one vector
    for binary in (floats, tensors):
        assert_lean(binary, registers=64)
        assert binary.loads["128"] == 2 * (3 + vectors) and binary.stores == {"128": 2 * vectors}
    assert_lean(products, registers=128)


@compiled_for_each_gpu
def test_numbers_that_change_do_not_compile_anew(capability: int) -> None:
    with compiling_for(capability) as binaries:
        for tokens in (512, 4096, 4608):
            x = [torch.empty((1, tokens, 64), dtype=torch.bfloat16)]
            ring, scales = [torch.empty((4, 1, tokens, 64), dtype=E4M3)], [torch.empty((4, 1, tokens))]
            for slot in range(4):
                residual.residual_push_float8(x, x, ring, slot, scales)
            for weights in ([1.0, 0.0, 0.0, 0.0], [2.0, -1.0, 0.5, 0.1]):
                forecast.residual_forecast_float8(x, ring, weights, 1.0, scales)
    assert len({id(binary.kernel) for binary in binaries}) == 2
