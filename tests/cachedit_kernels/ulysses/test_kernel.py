"""The Triton kernels behind ulysses_pack and ulysses_unpack: bits on a GPU or interpreted, and machine code."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from cachedit_kernels.testing.aot import assert_lean, compiled_for_each_gpu, compiling_for
from cachedit_kernels.testing.devices import kernel_devices, not_interpreting, run_under_interpreter
from cachedit_kernels.ulysses import kernel, reference
from cachedit_kernels.ulysses.layout import HEADS, SEQUENCE, layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on_each_device = pytest.mark.parametrize("device", kernel_devices())
for_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
QKV = (True, False, True)


def random_tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(count)]


def unsigned_nan(codes: Tensor) -> Tensor:
    """The sign of a code that is NaN is not promised."""
    return torch.where(codes == 0xFF, 0x7F, codes)


def assert_packs_and_unpacks(tensors: list[Tensor], splits: list[int], dim: int, float8: tuple[bool, ...]) -> None:
    buffer = kernel.ulysses_pack(tensors, splits, dim, float8)
    expected = reference.ulysses_pack([t.cpu() for t in tensors], splits, dim, float8)
    assert torch.equal(unsigned_nan(buffer.cpu()), unsigned_nan(expected))
    for dequantize in (True, False):
        arguments = (tensors[0].shape, splits, dim, tensors[0].dtype, float8, dequantize)
        for got, want in zip(
            kernel.ulysses_unpack(buffer, *arguments), reference.ulysses_unpack(expected, *arguments), strict=True
        ):
            assert got.dtype == want.dtype and got.is_contiguous()
            torch.testing.assert_close(got.cpu().float(), want.float(), rtol=0, atol=0, equal_nan=True)


@on_each_device
@for_each_dtype
@pytest.mark.parametrize(
    "float8", [QKV, (True,), (False,), (True, True), (False, False, False), (False, True)], ids=str
)
def test_formats(device: str, dtype: torch.dtype, float8: tuple[bool, ...]) -> None:
    tensors = random_tensors((2, 9, 6, 32), dtype, device, len(float8))
    assert_packs_and_unpacks(tensors, [3, 2, 1], HEADS, float8)


@on_each_device
@pytest.mark.parametrize("head_dim", [1, 7, 64, 128, 300])
@pytest.mark.parametrize(("dim", "splits"), [(HEADS, [5]), (HEADS, [2, 0, 3]), (SEQUENCE, [7, 6]), (SEQUENCE, [0, 13])])
def test_head_dims_and_uneven_splits(device: str, head_dim: int, dim: int, splits: list[int]) -> None:
    assert_packs_and_unpacks(random_tensors((2, 13, 5, head_dim), torch.bfloat16, device), splits, dim, QKV)


@on_each_device
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)], ids=str)
def test_nothing_to_pack(device: str, shape: tuple[int, ...]) -> None:
    for dim in (SEQUENCE, HEADS):
        assert_packs_and_unpacks(random_tensors(shape, torch.bfloat16, device), [shape[dim], 0], dim, QKV)


@on_each_device
@pytest.mark.parametrize("seed", range(10))
def test_any_shape(device: str, seed: int) -> None:
    pick = random.Random(seed)
    splits = [pick.choice([0, 1, 3, 8]) for _ in range(pick.randint(1, 8))]
    dim, float8 = pick.choice([SEQUENCE, HEADS]), tuple(pick.random() < 0.5 for _ in range(pick.randint(1, 3)))
    batch, other, head_dim = pick.randint(1, 3), pick.randint(1, 12), pick.choice([16, 24, 33, 64])
    shape = (batch, sum(splits), other, head_dim) if dim == SEQUENCE else (batch, other, sum(splits), head_dim)
    assert_packs_and_unpacks(random_tensors(shape, pick.choice(DTYPES), device, len(float8)), splits, dim, float8)


@on_each_device
@pytest.mark.parametrize("layout", ["transposed", "slice", "every_other", "expanded", "fused_qkv"])
def test_strides_are_read_right(device: str, layout: str) -> None:
    tensors = random_tensors((2, 6, 4, 16), torch.float16, device)
    if layout == "transposed":  # [B, H, L, D] in memory
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    elif layout == "slice":
        tensors = [t.new_full((2, 9, 4, 16), math.nan)[:, 2:-1].copy_(t) for t in tensors]
    elif layout == "every_other":
        tensors = [t.new_full((2, 6, 4, 32), math.nan)[..., ::2].copy_(t) for t in tensors]
    elif layout == "expanded":
        tensors = [t[:, :1].expand(t.shape) for t in tensors]
    else:  # slices of one projection
        tensors = list(torch.cat(tensors, dim=-1).unflatten(-1, (3, 16)).unbind(-2))
    assert_packs_and_unpacks(tensors, [3, 1], HEADS, QKV)


@on_each_device
@for_each_dtype
def test_codes_are_rounded_once_and_to_even(device: str, dtype: torch.dtype) -> None:
    """All E4M3 numbers, the midpoints between them and what lies next to those, in rows of scale 1."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    points = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(1e9))])
    points = points[points < 448].to(dtype)
    rows = torch.stack([torch.full_like(points, 448.0), points, -points, points * 0.37], dim=-1)
    assert_packs_and_unpacks([rows[None, None].to(device)], [len(points)], HEADS, (True,))


@on_each_device
@for_each_dtype
def test_zeros_nan_inf_and_tiny_rows(device: str, dtype: torch.dtype) -> None:
    (x,) = random_tensors((1, 8, 2, 32), dtype, device, 1)
    x[0, 0] = 0.0
    x[0, 1, 0, 3] = x[0, 2, 1] = math.nan
    x[0, 3, 0, 5], x[0, 4, 1, 31] = math.inf, -math.inf
    x[0, 5] *= torch.finfo(dtype).tiny
    x[0, 6] = torch.finfo(dtype).max
    assert_packs_and_unpacks([x], [1, 1], HEADS, (True,))


@on_each_device
@pytest.mark.parametrize(("dim", "splits"), [(HEADS, [2, 0, 3]), (SEQUENCE, [1, 7, 0, 5])])
def test_packs_into_buffers_apart(device: str, dim: int, splits: list[int]) -> None:
    """Each block to a buffer and a place of its own; what surrounds it stays."""
    tensors = random_tensors((2, 13, 5, 24), torch.bfloat16, device)
    blocks = layout(tensors[0].shape, splits, dim, 2, QKV)
    buffers = [torch.full((1 << 14,), 7, dtype=torch.uint8, device=device) for _ in splits]
    offsets = [1024 * p for p in range(len(splits))]
    # reversed, so that distances from the first are positive as well as negative
    kernel.ulysses_pack_into(tensors, splits, dim, QKV, buffers[::-1], offsets)
    expected = reference.ulysses_pack([t.cpu() for t in tensors], splits, dim, QKV)
    for block, buffer, offset in zip(blocks, buffers[::-1], offsets):
        want = torch.full((1 << 14,), 7, dtype=torch.uint8)
        want[offset : offset + block.nbytes] = expected[block.offset : block.offset + block.nbytes]
        assert torch.equal(buffer.cpu(), want)


@on_each_device
def test_a_buffer_may_begin_anywhere(device: str) -> None:
    tensors = random_tensors((1, 6, 4, 24), torch.bfloat16, device)
    arguments = ((1, 6, 4, 24), [3, 1], HEADS, torch.bfloat16, QKV)
    buffer = kernel.ulysses_pack(tensors, [3, 1], HEADS, QKV)
    shifted = buffer.new_empty(buffer.numel() + 1)[1:].copy_(buffer)
    assert all(map(torch.equal, *(kernel.ulysses_unpack(b, *arguments) for b in (buffer, shifted))))


@not_interpreting
def test_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@compiled_for_each_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@for_each_dtype
def test_compiles_to_wide_loads_and_stores(capability: int, dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = (torch.empty((1, 512, 24, head_dim), dtype=dtype) for _ in range(3))
    with compiling_for(capability) as binaries:
        buffer = kernel.ulysses_pack([q, k, v], [6] * 4, HEADS, QKV)
        for dequantize in (True, False):
            kernel.ulysses_unpack(buffer, q.shape, [128] * 4, SEQUENCE, dtype, QKV, dequantize)
    pack, unpack, keep = binaries
    accesses = 16 * dtype.itemsize // 16  # of 16 bytes, for a thread's 16 elements
    assert_lean(pack, registers=64)
    assert pack.loads == {"128": 3 * accesses, "64": 1, "32": 2}  # the numbers of the peer
    assert pack.stores == {"128": 2 + accesses, "32": 2, "8": 5}  # scales; what fills sections up
    for binary in (unpack, keep):
        assert_lean(binary, registers=64)
        assert binary.loads == {"128": 2 + accesses, "64": 1, "32": 4}
    assert unpack.stores == {"128": 3 * accesses}
    assert keep.stores == {"128": 2 + accesses, "32": 2}


@compiled_for_each_gpu
def test_lengths_and_splits_do_not_compile_anew(capability: int) -> None:
    with compiling_for(capability) as binaries:
        for length, heads, splits in ((512, 24, [12, 12]), (4097, 30, [8, 8, 7, 7]), (77, 3, [1, 1, 1, 0])):
            x = torch.empty((1, length, heads, 64), dtype=torch.bfloat16)
            kernel.ulysses_pack([x, x, x], splits, HEADS, QKV)
    assert len({id(binary.kernel) for binary in binaries}) == 1
