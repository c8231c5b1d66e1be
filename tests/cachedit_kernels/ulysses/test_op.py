"""ulysses_pack and ulysses_unpack, whatever implementation serves the CPU: equal to the reference to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cachedit_kernels import ulysses_pack, ulysses_unpack
from cachedit_kernels.ulysses import Quantized, reference
from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, even_splits, layout
from operands import DTYPES, dtypes, layouts, make, seeds

splits = st.lists(st.integers(0, 5), min_size=1, max_size=6)
formats = st.lists(st.booleans(), min_size=1, max_size=4)
dims = st.sampled_from([SEQUENCE, HEADS])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def same_buffers(buffer: Tensor, expected: Tensor) -> bool:
    """Equal bytes; the sign of a code that is NaN is not promised."""

    def unsigned_nan(buffer: Tensor) -> Tensor:
        return torch.where(buffer == 0xFF, 0x7F, buffer)

    return torch.equal(buffer, expected) or torch.equal(unsigned_nan(buffer), unsigned_nan(expected))


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of one tensor [B, L, H, D], through the operators."""
    buffer = ulysses_pack([x], [x.shape[2]], scatter_dim=HEADS, float8=[True])
    (result,) = ulysses_unpack(
        buffer, x.shape, [x.shape[2]], gather_dim=HEADS, dtype=x.dtype, float8=[True], dequantize=False
    )
    assert isinstance(result, Quantized) and result.codes.dtype == torch.float8_e4m3fn
    return result.codes, result.scales


@given(st.integers(0, 3), st.integers(0, 9), splits, st.integers(0, 70), dims, dtypes, formats, layouts, seeds)
@example(1, 300, [5, 0, 5, 4], 128, HEADS, torch.bfloat16, [True, False, True], "transposed", 0)
@example(2, 7, [100, 99, 130], 64, SEQUENCE, torch.float16, [True], "token slice", 0)
@example(1, 3, [2, 1], 20000, HEADS, torch.float32, [True, False], "column slice", 0)
def test_packing_and_unpacking_are_right(
    batch: int,
    other: int,
    splits: list[int],
    head_dim: int,
    dim: int,
    dtype: torch.dtype,
    float8: list[bool],
    strides: str,
    seed: int,
) -> None:
    total = sum(splits)
    shape = (batch, other, total, head_dim) if dim == HEADS else (batch, total, other, head_dim)
    tensors = [make(shape, dtype, strides, seed + i) for i in range(len(float8))]
    buffer = ulysses_pack(tensors, splits, scatter_dim=dim, float8=float8)
    assert same_buffers(buffer, reference.ulysses_pack(tensors, splits, dim, float8))
    for dequantize in (True, False):
        arguments = (buffer, shape, splits, dim, dtype, float8, dequantize)
        got = ulysses_unpack(*arguments[:3], gather_dim=dim, dtype=dtype, float8=float8, dequantize=dequantize)
        flat = [t for result in got for t in (result if isinstance(result, tuple) else (result,))]
        for g, expected in zip(flat, reference.ulysses_unpack(*arguments), strict=True):
            assert (g.dtype, g.shape, g.is_contiguous()) == (expected.dtype, expected.shape, True)
            torch.testing.assert_close(g.float(), expected.float(), rtol=0, atol=0, equal_nan=True)
    for g, tensor, is_quantised in zip(reference.ulysses_unpack(*arguments[:-1]), tensors, float8):
        if is_quantised:  # half a step of three mantissa bits or of the subnormal numbers, then the dtype's rounding
            amax = tensor.double().abs().amax(-1, keepdim=True) if head_dim else 0.0
            error = (g.double() - tensor.double()).abs()
            assert (error <= tensor.double().abs() * 2.0**-4 * 1.07 + amax / 448 * 2.0**-10 * 1.01).all()
        else:
            assert torch.equal(g, tensor)


@given(st.integers(1, 2), splits, st.integers(0, 9), st.integers(0, 20), formats, seeds)
def test_an_exchange_gives_every_rank_what_one_process_would_have(
    batch: int, lengths: list[int], heads: int, head_dim: int, float8: list[bool], seed: int
) -> None:
    """Both exchanges played by cutting buffers up: heads scattered and sequence gathered, then the other way round."""
    world, whole_shape = len(lengths), (batch, sum(lengths), heads, head_dim)
    head_splits = even_splits(heads, world)
    whole = [make(whole_shape, torch.bfloat16, "contiguous", seed + i) for i in range(len(float8))]
    rounded = [
        reference.from_e4m3(*reference.to_e4m3(t), t.dtype) if quantise else t for t, quantise in zip(whole, float8)
    ]

    def exchange(shards: list[list[Tensor]], splits: tuple[int, ...], dim: int) -> list[list[Tensor]]:
        sent = []
        for tensors in shards:
            blocks = layout(tensors[0].shape, splits, dim, 2, float8)
            buffer = ulysses_pack(tensors, splits, scatter_dim=dim, float8=float8)
            sent.append(buffer.split([block.nbytes for block in blocks]))
        gathered = HEADS + SEQUENCE - dim
        received = []
        for rank, size in enumerate(splits):
            sizes = [tensors[0].shape[gathered] for tensors in shards]
            shape = list(whole_shape)
            shape[dim] = size
            buffer = torch.cat([blocks[rank] for blocks in sent])
            received.append(
                ulysses_unpack(buffer, shape, sizes, gather_dim=gathered, dtype=torch.bfloat16, float8=float8)
            )
        return received

    by_length = [list(parts) for parts in zip(*(t.split(lengths, dim=1) for t in whole))]
    by_heads = exchange(by_length, head_splits, HEADS)
    for got, *expected in zip(by_heads, *(t.split(head_splits, dim=2) for t in rounded)):
        assert all(map(torch.equal, got, expected))
    if not any(float8):
        for got, expected in zip(exchange(by_heads, tuple(lengths), SEQUENCE), by_length):
            assert all(map(torch.equal, got, expected))


def quotients() -> Tensor:
    """Every E4M3 number, every midpoint between two, and their float32 neighbours on both sides; all below 448."""
    numbers = E4M3[:0x7F]
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    low, high = (torch.nextafter(points, torch.tensor(end)) for end in (-1.0, 1e9))
    points = torch.cat([points, low, high])
    return torch.cat([points, -points])[torch.cat([points, -points]).abs() <= 448]


def test_codes_are_the_nearest_numbers_and_even_between_two() -> None:
    """Against a search through all numbers in float64: the largest element of each row is 448, so that scales are 1."""
    points = quotients()
    x = torch.stack([torch.full_like(points, 448.0), points], dim=-1)[None, None]
    codes, scales = quantised(x)
    assert (scales == 1).all()
    numbers = E4M3[:0x7F].double()
    distance = (points.double().abs()[:, None] - numbers).abs()
    nearest = distance == distance.amin(-1, keepdim=True)  # two where they are equally near
    nearest = torch.where(nearest, torch.arange(0x7F) % 2, 2).argmin(-1)
    got = codes[..., 1].flatten().view(torch.uint8)
    assert torch.equal((got & 0x7F).long(), nearest)
    assert torch.equal((got >> 7).bool(), points.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_magnitude(dtype: torch.dtype) -> None:
    """From subnormal to the largest numbers; codes equal to torch's cast of the divided value, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-140, 129)[:, None]
    x = torch.randn(269, 96, generator=generator).double() * 2.0 ** exponents.double()
    limit = torch.finfo(dtype).max
    x = x.clamp(-limit, limit).to(dtype)[None, None]
    codes, scales = quantised(x)
    amax = x.float().abs().amax(-1)
    assert torch.equal(scales, (amax / 448).clamp(min=2.0**-126))
    divided = (x.float() / scales[..., None]).clamp(-448, 448)
    assert torch.equal(codes.view(torch.uint8), divided.to(torch.float8_e4m3fn).view(torch.uint8))
    normal = amax >= 448 * 2.0**-126
    assert (codes.float().abs().amax(-1)[normal] == 448).all() and normal.sum() >= 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 32, 45, 128])
def test_rows_of_zeros_stay_zeros(dtype: torch.dtype, head_dim: int) -> None:
    x = torch.zeros(1, 3, 2, head_dim, dtype=dtype)
    x[0, 1] = -0.0
    codes, scales = quantised(x)
    assert (scales == 2.0**-126).all() and (codes.float() == 0).all()
    assert torch.equal(codes.float().signbit(), x.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 31, 32, 44])
def test_nan_stays_where_it_is(dtype: torch.dtype, where: int) -> None:
    x = torch.ones(1, 5, 3, 45, dtype=dtype)
    x[0, 2, 1, where] = math.nan
    codes, scales = quantised(x)
    assert torch.equal(codes.float().isnan(), x.isnan()) and (scales == torch.tensor(1.0) / 448).all()
    x[0, 2, 1] = math.nan
    codes, scales = quantised(x)
    assert torch.equal(codes.float().isnan(), x.isnan()) and scales[0, 2, 1] == 2.0**-126


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinity_makes_its_row_nan(dtype: torch.dtype, value: float) -> None:
    x = torch.ones(1, 5, 3, 45, dtype=dtype)
    x[0, 2, 1, 33] = value
    buffer = ulysses_pack([x], [3], scatter_dim=HEADS, float8=[True])
    (got,) = ulysses_unpack(buffer, x.shape, [3], gather_dim=HEADS, dtype=dtype, float8=[True])
    assert got[0, 2, 1].isnan().all() and got.isnan().sum() == 45
    codes, scales = quantised(x)
    assert scales[0, 2, 1] == math.inf and codes[0, 2, 1, 33].float().isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_comes_back(dtype: torch.dtype) -> None:
    """All 256 codes, 448 among them so that the scale is 1."""
    x = E4M3.to(dtype).view(1, 1, 1, 256)
    buffer = ulysses_pack([x], [1], scatter_dim=HEADS, float8=[True])
    (got,) = ulysses_unpack(buffer, x.shape, [1], gather_dim=HEADS, dtype=dtype, float8=[True])
    torch.testing.assert_close(got, x, rtol=0, atol=0, equal_nan=True)


def test_what_fills_up_sections_is_zero() -> None:
    shape, float8 = (1, 3, 5, 7), (True, False, True)
    tensors = [torch.full(shape, 3.0, dtype=torch.bfloat16)] * 3
    buffer = ulysses_pack(tensors, [2, 3], scatter_dim=HEADS, float8=float8)
    for block in layout(shape, [2, 3], HEADS, 2, float8):
        for section in (*block.values, *filter(None, block.scales)):
            buffer[section.offset : section.offset + section.nbytes] = 0
    assert not buffer.any()


def test_a_buffer_may_begin_anywhere() -> None:
    x = torch.randn(1, 6, 4, 24)
    buffer = ulysses_pack([x, x], [3, 1], scatter_dim=HEADS, float8=[True, False])
    shifted = torch.empty(buffer.numel() + 1, dtype=torch.uint8)[1:].copy_(buffer)
    got = [
        ulysses_unpack(b, x.shape, [3, 1], gather_dim=HEADS, dtype=x.dtype, float8=[True, False])
        for b in (buffer, shifted)
    ]
    assert all(map(torch.equal, *got))
