"""The Triton kernel behind merge_attention: values on a GPU or interpreted, and machine code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cachedit_kernels.attention import kernel, reference
from cachedit_kernels.testing.aot import assert_lean, compiled_for_each_gpu, compiling_for
from cachedit_kernels.testing.devices import kernel_devices, not_interpreting, run_under_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(first, second) for first in DTYPES for second in DTYPES if first in (torch.float32, second)]
on_each_device = pytest.mark.parametrize("device", kernel_devices())
for_each_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)
GAPS = (0.0, 1e-6, -0.7, 3.0, -20.0, 60.0, -100.0, 1e4, -1e30, -math.inf)


def operands(shape: tuple[int, ...], pair: tuple[torch.dtype, torch.dtype], device: str, seed: int = 0) -> list[Tensor]:
    """out, lse, out2, lse2 with gaps of every kind, empty results on either side and on both."""
    generator = torch.Generator().manual_seed(seed)
    out, out2 = (torch.randn(shape, generator=generator).to(dtype) for dtype in pair)
    lse = 10 * torch.randn(shape[:3], generator=generator)
    lse2 = lse + torch.tensor(GAPS)[torch.randint(len(GAPS), shape[:3], generator=generator)]
    empty = torch.rand(shape[:3], generator=generator) < 0.2
    return [tensor.to(device) for tensor in (out, torch.where(empty, -math.inf, lse), out2, lse2)]


def assert_merged(got: tuple[Tensor, Tensor], arguments: list[Tensor]) -> None:
    """Equal to the float64 truth but for fp32 arithmetic and one rounding."""
    expected, expected_lse = reference.merge_attention(*(tensor.double() for tensor in arguments))
    merged, merged_lse = got
    dtype = arguments[0].dtype
    assert merged.dtype == dtype and merged.is_contiguous() and merged_lse.is_contiguous()
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(merged.double(), expected, rtol=rounding + 1e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(merged_lse.double(), expected_lse, rtol=3e-7, atol=3e-7, equal_nan=True)


@on_each_device
@for_each_pair
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 9, 3, 64), (1, 5, 2, 128), (3, 4, 5, 7), (1, 2, 3, 300)], ids=str)
def test_values_match_float64(device: str, pair: tuple, shape: tuple[int, ...]) -> None:
    arguments = operands(shape, pair, device)
    assert_merged(kernel.merge_attention(*arguments), arguments)


@on_each_device
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)], ids=str)
def test_nothing_to_merge(device: str, shape: tuple[int, ...]) -> None:
    arguments = operands(shape, (torch.bfloat16, torch.bfloat16), device)
    assert_merged(kernel.merge_attention(*arguments), arguments)


@on_each_device
@pytest.mark.parametrize("layout", ["transposed", "slice", "every_other", "expanded"])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_strides_are_read_right(device: str, which: int, layout: str) -> None:
    arguments = operands((2, 6, 4, 16), (torch.float16, torch.float16), device)
    tensor = arguments[which]
    if layout == "transposed":  # [B, H, L, ...] in memory
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slice":
        tensor = tensor.new_full((2, 9, *tensor.shape[2:]), math.nan)[:, 2:-1].copy_(tensor)
    elif layout == "every_other":
        tensor = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)[..., ::2].copy_(tensor)
    else:
        tensor = tensor[:, :1].expand(tensor.shape)
    arguments[which] = tensor
    assert_merged(kernel.merge_attention(*arguments), arguments)


@on_each_device
def test_what_has_no_weight_is_not_read(device: str) -> None:
    out, lse, out2, lse2 = operands((1, 8, 3, 32), (torch.bfloat16, torch.bfloat16), device)
    lse[0, :6], lse2[0, 3:] = -math.inf, -math.inf
    out[0, :6], out2[0, 3:] = math.nan, math.nan
    lse2[0, :3], lse[0, 6:] = 1.0, 2.0
    merged, merged_lse = kernel.merge_attention(out, lse, out2, lse2)
    assert torch.equal(merged[0, :3], out2[0, :3]) and torch.equal(merged[0, 6:], out[0, 6:])
    assert (merged[0, 3:6] == 0).all() and (merged_lse[0, 3:6] == -math.inf).all()


@on_each_device
def test_nan_passes(device: str) -> None:
    out, lse, out2, lse2 = (t.fill_(1) for t in operands((1, 6, 2, 32), (torch.float32, torch.float16), device))
    out[0, 1, 1, 5] = out2[0, 2, 0, 31] = lse[0, 3, 1] = lse2[0, 4, 0] = lse[0, 5, 0] = math.nan
    lse2[0, 5, 0] = -math.inf
    merged, merged_lse = kernel.merge_attention(out, lse, out2, lse2)
    assert merged.isnan().sum() == 2 + 3 * 32 and merged[0, 1, 1, 5].isnan() and merged[0, 2, 0, 31].isnan()
    assert merged_lse.isnan().nonzero().tolist() == [[0, 3, 1], [0, 4, 0], [0, 5, 0]]


@not_interpreting
def test_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@compiled_for_each_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@for_each_pair
def test_compiles_to_wide_loads_and_stores(capability: int, pair: tuple, head_dim: int) -> None:
    out, out2 = (torch.empty((1, 512, 24, head_dim), dtype=dtype) for dtype in pair)
    lse = torch.empty((1, 24, 512)).transpose(1, 2)
    with compiling_for(capability) as binaries:
        kernel.merge_attention(out, lse, out2, lse)
    (binary,) = binaries
    assert_lean(binary, registers=80)
    assert set(binary.loads) <= {"128", "64", "32"} and set(binary.stores) == {"128", "32"}
    assert binary.loads["64"] == 0 or pair[0] != pair[1]  # beside fp32, 16-bit elements come eight bytes at a time


@compiled_for_each_gpu
def test_lengths_do_not_compile_anew(capability: int) -> None:
    with compiling_for(capability) as binaries:
        for batch, length, heads in ((1, 512, 24), (2, 4097, 3), (3, 77, 5)):
            out = torch.empty((batch, length, heads, 64), dtype=torch.bfloat16)
            lse = torch.empty((batch, heads, length)).transpose(1, 2)
            kernel.merge_attention(out, lse, out, lse)
    assert len({id(binary.kernel) for binary in binaries}) == 1
