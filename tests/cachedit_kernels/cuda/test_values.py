"""The CUDA C++ kernels' values, with whatever runs them: a GPU, or the CPU that they have been compiled for.

An ordinary run of pytest starts this module again in a process of its own, as operators are registered once a process.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cachedit_kernels as ck
import cuda_kernels
from cachedit_kernels import _backend
from cachedit_kernels.attention import reference as attention_reference
from cachedit_kernels.forecast import reference as forecast_reference
from cachedit_kernels.residual import reference as residual_reference
from cachedit_kernels.ulysses import reference as ulysses_reference
from operands import DTYPES, make

FORCED = os.environ.get(_backend.VARIABLE) == "cuda"
DEVICE = "cuda" if FORCED else "cpu"
running = pytest.mark.skipif(not FORCED and cuda_kernels.LIBRARY is None, reason="runs in a process of its own")
for_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# A tile has 2048 or 4096 elements; two multiprocessors are played on the host, so that blocks take several tiles.
SHAPES = [(), (1,), (3,), (2, 33, 24), (1, 2, 3, 5, 7), (3, 257, 41), (0,), (2, 0, 8), (3, 4096), (2, 8195), (70001,)]

# Tests of what the operators promise on CPU alone: the bits of sums, and sums of millions of terms (exact enough where
# more than two multiprocessors share them).
OF_THE_CPU = "sums_per_sample or layout_does_not_change or long_sum"
OPERATORS = ("residual", "forecast", "attention", "ulysses")


@pytest.mark.slow
def test_on_the_host(tmp_path: Path) -> None:
    """This module, and what every implementation of the operators must pass, on the CPU."""
    if cuda_kernels.LIBRARY is not None or FORCED:
        pytest.skip("this is that process")
    library = tmp_path / "kernels.so"
    cuda_kernels.compile_for_host(library)
    tests = [__file__, *(str(Path(__file__).parents[1] / operator / "test_op.py") for operator in OPERATORS)]
    in_own_process("-p", "cuda_kernels", "-k", f"not ({OF_THE_CPU})", *tests, CUDA_ON_HOST=str(library))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or FORCED, reason="no CUDA device, or this is that process")
def test_on_a_gpu() -> None:
    in_own_process(__file__, CACHEDIT_KERNELS_BACKEND="cuda")


def in_own_process(*arguments: str, **environment: str) -> None:
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(cuda_kernels.__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, f"{result.stdout[-8000:]}\n{result.stderr[-4000:]}"


def test_operators_of_the_table_are_those_with_a_kernel() -> None:
    """What Python offers is what the library registers."""
    sources = (cuda_kernels.ROOT / "csrc" / "cuda" / "ops.cpp").read_text()
    for name, operator in _backend.OPERATORS.items():
        for overload in operator.overloads:
            assert (f'{{"{overload}",' in sources) == (name in _backend.CUDA_DEFAULTS), overload


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    values = make(shape, dtype, layout, seed)
    whole = values._base if values._base is not None else values
    moved = whole.to(DEVICE)
    return moved.as_strided(values.shape, values.stride(), values.storage_offset())


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@running
@for_each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole", "per_sample"])
def test_sums_match_float64(dtype: torch.dtype, shape: tuple[int, ...], per_sample: bool) -> None:
    if per_sample and (not shape or shape[0] > 5):
        pytest.skip("a number has no samples; thousands of samples are thousands of blocks")
    x, y, a = (random(shape, dtype, seed) for seed in range(3))
    got = ck.residual_l1([x], [y], [a], per_sample), ck.l1([x], [y], per_sample)
    trio, pair = [doubles([t]) for t in (x, y, a)], [doubles([t]) for t in (x, y)]
    expected = residual_reference.residual_l1(*trio, per_sample), residual_reference.l1(*pair, per_sample)
    for sums, right in zip(got, expected):
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), right, rtol=2e-6, atol=1e-6)


@running
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole", "per_sample"])
@pytest.mark.parametrize("streams", [1, 4, 5, 9])
def test_streams_may_differ_and_sums_have_the_same_bits_again(streams: int, per_sample: bool) -> None:
    shapes = [(2, 70, 640), (2, 7, 24), (2, 0, 3), (2, 5), (2, 33, 3, 16)]
    lists = [[random(shapes[s % 5], DTYPES[s % 3], 9 * s + i) for s in range(streams)] for i in range(3)]
    got = ck.residual_l1(*lists, per_sample)
    expected = residual_reference.residual_l1(*map(doubles, lists), per_sample)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-6)
    for _ in range(3):  # on the host, blocks finish in the opposite order every other time
        assert torch.equal(ck.residual_l1(*lists, per_sample), got)
    ring = [torch.full((2, *x.shape), 7.0, dtype=x.dtype, device=DEVICE) for x in lists[0]]
    ck.residual_push(lists[0], lists[1], ring, 1)
    for x, y, r in zip(lists[0], lists[1], ring):
        assert torch.equal(r[1], (y.float() - x.float()).to(x.dtype)) and (r[0] == 7).all()


@running
def test_alignment_does_not_change_a_bit_of_a_sum() -> None:
    x, y, a = (random((20001,), torch.bfloat16, seed) for seed in range(3))
    moved = [torch.cat([t.new_zeros(3), t])[3:] for t in (x, y, a)]
    assert moved[0].data_ptr() % 16 != 0
    assert torch.equal(ck.residual_l1([x], [y], [a]), ck.residual_l1(*([t] for t in moved)))


@running
@pytest.mark.parametrize("layout", ["token slice", "batch slice", "transposed", "every second", "offset", "expanded"])
def test_layouts(layout: str) -> None:
    x, y, a = (random((3, 40, 130), torch.float16, seed, layout) for seed in range(3))
    expected = residual_reference.residual_l1(*(doubles([t]) for t in (x, y, a)))
    torch.testing.assert_close(ck.residual_l1([x], [y], [a]).double(), expected, rtol=2e-6, atol=1e-6)
    ring = torch.zeros((2, *x.shape), dtype=x.dtype, device=DEVICE)
    ck.residual_push([x], [y], [ring], 0)
    assert torch.equal(ring[0], (y.float() - x.float()).to(x.dtype))
    stack = torch.stack([a, y]).transpose(1, 2) if layout == "transposed" else torch.stack([a, y])
    stack = stack.transpose(1, 2) if layout == "transposed" else stack
    (got,) = ck.residual_forecast([x], [stack], [0.5, -2.0])
    assert torch.equal(got, (x.float() + 0.5 * a.float() - 2.0 * y.float()).to(x.dtype))


@running
def test_offsets_beyond_32_bits() -> None:
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    stride = 2**31  # between samples and between slots; memory in between is never touched, so the CPU never maps it
    x = torch.empty(stride + 512, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 512), (stride, 1))
    x.copy_(torch.arange(1024).view(2, 512) % 64)
    ring = torch.empty(stride + 1024, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 2, 512), (stride, 512, 1))
    assert ck.l1([x], [2 * x], per_sample=True).tolist() == [[[16128.0, 16128.0]] * 2]
    ck.residual_push([x], [2 * x], [ring], 0)
    ck.residual_push([x], [3 * x], [ring], 1)
    assert torch.equal(ring[0], x) and torch.equal(ring[1], 2 * x)
    (forecast,) = ck.residual_forecast([x], [ring], [1.0, -0.5])
    assert torch.equal(forecast, x)
    heads = x.as_strided((2, 2, 4, 64), (stride, 256, 64, 1))
    packed = ck.ulysses_pack([heads], [2, 2], 2, [False])
    assert torch.equal(packed.view(torch.bfloat16), heads.view(2, 2, 2, 2, 64).permute(2, 0, 1, 3, 4).flatten())
    lse = torch.zeros(2, 2, 4, device=DEVICE)
    merged, _ = ck.merge_attention(heads, lse, heads, lse)
    assert torch.equal(merged, heads)


@running
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.gpu
def test_more_than_32_bits_of_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    n = 2**31 + 4096
    x, y, ring = (torch.zeros(n, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    y[-5:] = 2
    assert ck.l1([x], [y]).tolist() == [[10.0, 0.0]]
    ck.residual_push([x], [y], [ring[None]], 0)
    assert ring[-5:].eq(2).all() and ring.count_nonzero() == 5
    (forecast,) = ck.residual_forecast([y], [ring[None]], [1.0])
    assert forecast[-5:].eq(4).all() and forecast.count_nonzero() == 5


@running
def test_nan_and_inf_pass_through() -> None:
    x, y, a = (random((9000,), torch.float32, seed) for seed in range(3))
    y[8999], a[0] = math.nan, math.inf
    sums = ck.residual_l1([x], [y], [a])
    assert sums[0, 0].isnan() and sums[0, 1].isinf()
    (got,) = ck.residual_forecast([x], [torch.stack([y, a])], [1.0, 1.0])
    assert got[8999].isnan() and got[0].isinf() and got[1:8999].isfinite().all()


@running
@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_push_reads_its_slot_from_a_tensor(slot_dtype: torch.dtype) -> None:
    x, y = random((2, 9, 8), torch.bfloat16, 0), random((2, 9, 8), torch.bfloat16, 1)
    ring = torch.zeros((3, *x.shape), dtype=x.dtype, device=DEVICE)
    for slot in (2, 0, 1):
        ck.residual_push([x * slot], [y], [ring], torch.tensor(slot, dtype=slot_dtype, device=DEVICE))
    for slot in range(3):
        assert torch.equal(ring[slot], (y.float() - (x * slot).float()).to(x.dtype))


@running
@pytest.mark.parametrize("slot", [-1, 3])
def test_push_never_writes_outside_the_ring(slot: int) -> None:
    x, y = random((2, 8), torch.float32, 0), random((2, 8), torch.float32, 1)
    storage = torch.full((5, 2, 8), 7.0, device=DEVICE)
    ck.residual_push([x], [y], [storage[1:4]], torch.tensor(slot, device=DEVICE))
    assert (storage == 7).all()


@running
@for_each_dtype
@pytest.mark.parametrize("shape", [(3,), (2, 33, 24), (3, 257, 41), (2, 0, 8), (3, 4096), (70001,)], ids=str)
@pytest.mark.parametrize("slots", [0, 1, 2, 4, 7])
def test_forecasts_round_like_the_reference(dtype: torch.dtype, shape: tuple[int, ...], slots: int) -> None:
    x, ring = random(shape, dtype, 0), random((slots, *shape), dtype, 1)
    if slots > 1:
        ring[1] = math.nan  # not read: its weight is zero
    weights = [0.0 if k == 1 else 1.5 - 0.7 * k for k in range(slots)]
    on_device = torch.tensor(weights, device=DEVICE)
    for base in (1.0, 0.0, -0.3):
        (expected,) = forecast_reference.residual_forecast([x], [ring], weights, base)
        for given in (weights, on_device):
            (got,) = ck.residual_forecast([x], [ring], given, base)
            assert got.is_contiguous() and torch.equal(got, expected)


@running
def test_forecasts_take_weights_per_sample() -> None:
    hidden = [random((3, 50, 24), torch.bfloat16, 0), random((3, 7), torch.float32, 1)]
    ring = [random((2, *h.shape), h.dtype, 2 + i) for i, h in enumerate(hidden)]
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-2.0, 0.5]], device=DEVICE)
    for given in (weights, weights.t().contiguous().t()):
        got = ck.residual_forecast(hidden, ring, given)
        for mine, right in zip(got, forecast_reference.residual_forecast(hidden, ring, weights)):
            assert torch.equal(mine, right)


@running
def test_too_many_weights_as_numbers_are_refused() -> None:
    x = random((4,), torch.float32, 0)
    ring = random((65, 4), torch.float32, 1)
    with pytest.raises(RuntimeError, match="residual_forecast: weights must be at most 64 numbers, or a tensor, got"):
        ck.residual_forecast([x], [ring], [1.0] * 65)
    ck.residual_forecast([x], [ring], torch.ones(65, device=DEVICE))


@running
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.gpu
def test_a_captured_graph_replays_beside_eager_launches() -> None:
    x, y, a = (random((2, 4096, 640), torch.bfloat16, seed) for seed in range(3))
    expected = ck.residual_l1([x], [y], [a])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ck.residual_l1([x], [y], [a])
    for _ in range(3):
        graph.replay()
        eager = ck.residual_l1([x], [y], [a])
        torch.cuda.synchronize()
        assert torch.equal(captured, expected) and torch.equal(eager, expected)


@running
@pytest.mark.parametrize("head_dim", [64, 128, 72, 1000])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2], ids=str
)
def test_attention_is_merged(dtypes: tuple[torch.dtype, torch.dtype], head_dim: int) -> None:
    layout = "column slice" if head_dim == 128 else "token slice"  # the former is not aligned
    out, out2 = (random((2, 21, 3, head_dim), dtype, seed, layout) for seed, dtype in enumerate(dtypes))
    lse, lse2 = (5 * random((2, 21, 3), torch.float32, 2 + seed, "transposed") for seed in range(2))
    lse[0, :7], lse2[0, 3:9] = -math.inf, -math.inf
    out[0, :7], out2[0, 3:9] = math.nan, math.nan  # not read
    got = ck.merge_attention(out, lse, out2, lse2)
    for mine, right in zip(got, attention_reference.merge_attention(out, lse, out2, lse2)):
        assert mine.is_contiguous() and mine.dtype == right.dtype
        torch.testing.assert_close(mine, right)


@running
@for_each_dtype
@pytest.mark.parametrize("head_dim", [64, 128, 40, 7])
@pytest.mark.parametrize("dim", [1, 2])
def test_exchanges_have_the_bits_of_the_reference(dtype: torch.dtype, head_dim: int, dim: int) -> None:
    shape, splits = (2, 19, 5, head_dim), {1: [9, 0, 10], 2: [2, 2, 1]}[dim]
    layout = {1: "token slice", 2: "column slice"}[dim]  # the latter is not aligned
    tensors = [random(shape, dtype, seed, layout) for seed in range(6)]  # more than one launch takes
    tensors[0][0, 0, 0] = 0.0
    tensors[1][1] *= 300.0
    float8 = [True, False, True, True, False, True]
    buffer = ck.ulysses_pack(tensors, splits, dim, float8)
    assert torch.equal(buffer, ulysses_reference.ulysses_pack(tensors, splits, dim, float8))
    for dequantize in (True, False):
        arguments = (buffer, shape, splits, dim, dtype, float8, dequantize)
        got = torch.ops.cachedit.ulysses_unpack(*arguments)
        for mine, right in zip(got, ulysses_reference.ulysses_unpack(*arguments)):
            assert mine.dtype == right.dtype and torch.equal(mine.float(), right.float())
