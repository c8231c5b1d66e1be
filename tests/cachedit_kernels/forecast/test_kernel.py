"""The Triton kernel behind residual_forecast: values on a GPU or interpreted, and machine code."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cachedit_kernels.forecast import kernel
from cachedit_kernels.testing.aot import assert_lean, compiled_for_each_gpu, compiling_for
from cachedit_kernels.testing.devices import INTERPRETING, kernel_devices, not_interpreting, run_under_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (3,), (5, 7), (2, 1, 16), (2, 33, 24), (1, 2, 3, 5, 7), (3, 257, 41), (0,), (2, 0, 8), (0, 4)]
WEIGHTS = [1.875, -1.25, 0.0, 0.375]
on_each_device = pytest.mark.parametrize("device", kernel_devices())
for_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
for_each_kind = pytest.mark.parametrize("kind", ["floats", "tensor", "per_sample"])


def random_stream(shape: Sequence[int], slots: int, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """hidden and ring"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tuple(shape), (slots, *shape))
    return [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes]


def weights_of(kind: str, values: list[float], batch: int, device: str) -> list[float] | Tensor:
    if kind == "floats":
        return values
    if kind == "tensor":
        return torch.tensor(values, dtype=torch.float32, device=device)
    factors = torch.arange(batch, device=device)[:, None] + 0.5
    return factors * torch.tensor(values, dtype=torch.float32, device=device)


def expected_forecast(hidden: Tensor, ring: Tensor, weights: list[float] | Tensor, base: float) -> Tensor:
    """In float64; what has weight zero is left out, whatever it holds."""
    table = torch.as_tensor(weights, dtype=torch.float32).double().to(hidden.device)
    table = table.expand(hidden.shape[0] if hidden.dim() else 1, ring.shape[0])
    result = hidden.double() * base if base != 0.0 else torch.zeros(hidden.shape, device=hidden.device).double()
    for k in range(ring.shape[0]):
        weight = table[:, k].reshape(-1, *[1] * (hidden.dim() - 1)) if hidden.dim() else table[0, k]
        result = result + torch.where(weight == 0, 0.0, ring[k].double() * weight)
    return result


def assert_rounded(actual: Tensor, expected: Tensor, hidden: Tensor) -> None:
    """Equal to the float64 truth but for fp32 accumulation and one rounding."""
    assert actual.dtype == hidden.dtype and actual.shape == hidden.shape and actual.is_contiguous()
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[hidden.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rounding + 1e-6, atol=1e-5, equal_nan=True)


@on_each_device
@for_each_dtype
@for_each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_float64(device: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    if kind == "per_sample" and not shape:
        pytest.skip("a number has no samples")
    hidden, ring = random_stream(shape, 4, dtype, device)
    weights = weights_of(kind, WEIGHTS, shape[0] if shape else 1, device)
    (output,) = kernel.residual_forecast([hidden], [ring], weights, 1.0)
    assert_rounded(output, expected_forecast(hidden, ring, weights, 1.0), hidden)


@on_each_device
@for_each_kind
@pytest.mark.parametrize("base", [1.0, 0.0, -0.5, 16.0])
@pytest.mark.parametrize("slots", [0, 1, 2, 3, 6])
def test_any_number_of_slots_and_any_base(device: str, kind: str, base: float, slots: int) -> None:
    hidden, ring = random_stream((2, 9, 16), slots, torch.bfloat16, device)
    weights = weights_of(kind, [0.25 * (k + 1) for k in range(slots)], 2, device)
    (output,) = kernel.residual_forecast([hidden], [ring], weights, base)
    assert_rounded(output, expected_forecast(hidden, ring, weights, base), hidden)


@on_each_device
@for_each_dtype
@for_each_kind
def test_what_has_weight_zero_is_not_read(device: str, dtype: torch.dtype, kind: str) -> None:
    hidden, ring = random_stream((2, 50, 16), 3, dtype, device)
    ring[1] = math.nan
    weights = weights_of(kind, [1.0, 0.0, 2.0], 2, device)
    (output,) = kernel.residual_forecast([hidden], [ring], weights, 1.0)
    assert output.isfinite().all()
    assert_rounded(output, expected_forecast(hidden, ring, weights, 1.0), hidden)
    (output,) = kernel.residual_forecast([hidden.fill_(math.nan)], [ring], weights, 0.0)
    assert output.isfinite().all()
    assert_rounded(output, expected_forecast(hidden, ring, weights, 0.0), hidden)


@on_each_device
def test_weights_are_zero_for_some_samples_only(device: str) -> None:
    hidden, ring = random_stream((2, 50, 16), 2, torch.float32, device)
    ring[0, 1] = math.nan
    weights = torch.tensor([[1.0, 2.0], [0.0, 3.0]], device=device)
    for w in (weights, weights.t().contiguous().t()):  # any strides
        (output,) = kernel.residual_forecast([hidden], [ring], w, 1.0)
        assert output.isfinite().all()
        assert_rounded(output, expected_forecast(hidden, ring, w, 1.0), hidden)


@on_each_device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_their_elements_and_no_others(device: str, value: float) -> None:
    hidden, ring = random_stream((2, 700), 2, torch.bfloat16, device)
    hidden[0, 3] = value
    ring[1, 1, 699] = value
    (output,) = kernel.residual_forecast([hidden], [ring], [1.0, 0.5], 1.0)
    assert_rounded(output, expected_forecast(hidden, ring, [1.0, 0.5], 1.0), hidden)
    assert (~output.isfinite()).nonzero().tolist() == [[0, 3], [1, 699]]
    (output,) = kernel.residual_forecast([hidden], [ring], [value, 0.0], 0.0)
    assert not output.isfinite().any()


@on_each_device
@for_each_kind
@pytest.mark.parametrize("streams", [2, 4, 5, 9])
def test_streams_may_differ_in_shape_and_dtype(device: str, kind: str, streams: int) -> None:
    shapes = [(2, 70, 64), (2, 7, 24), (2, 0, 3), (2, 5), (2, 33, 3, 16)]
    pairs = [random_stream(shapes[s % 5], 3, DTYPES[s % 3], device, seed=s) for s in range(streams)]
    weights = weights_of(kind, [1.0, 0.0, -0.5], 2, device)
    outputs = kernel.residual_forecast([h for h, _ in pairs], [r for _, r in pairs], weights, 1.0)
    assert len(outputs) == streams
    for output, (hidden, ring) in zip(outputs, pairs, strict=True):
        assert_rounded(output, expected_forecast(hidden, ring, weights, 1.0), hidden)


@on_each_device
@for_each_kind
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["slice", "transposed", "every_other", "ring_slice", "ring_transposed"])
def test_strides_are_read_right(device: str, kind: str, batch: int, layout: str) -> None:
    hidden, ring = random_stream((batch, 20, 32), 2, torch.float16, device)
    weights = weights_of(kind, [1.5, -0.5], batch, device)
    expected = expected_forecast(hidden, ring, weights, 1.0)
    if layout == "slice":
        hidden = hidden.new_full((batch, 24, 32), math.nan)[:, 3:-1].copy_(hidden)
    elif layout == "transposed":
        hidden = hidden.new_empty((32, 20, batch)).permute(2, 1, 0).copy_(hidden)
    elif layout == "every_other":
        hidden = hidden.new_full((batch, 20, 64), math.nan)[..., ::2].copy_(hidden)
    elif layout == "ring_slice":
        ring = ring.new_full((4, batch, 24, 32), math.nan)[::2, :, 3:-1].copy_(ring)
    else:
        ring = ring.new_empty((32, 2, 20, batch)).permute(1, 3, 2, 0).copy_(ring)
    (output,) = kernel.residual_forecast([hidden], [ring], weights, 1.0)
    assert_rounded(output, expected, hidden)


@on_each_device
@pytest.mark.parametrize("seed", range(20))
def test_any_shape(device: str, seed: int) -> None:
    pick = random.Random(seed)
    shape = (pick.randint(1, 3), *(pick.randint(0, 40) for _ in range(pick.randint(0, 3))))
    values = [pick.choice([0.0, 1.0, -2.0, 0.3, 16.0]) for _ in range(pick.randint(1, 4))]
    dtype, base = pick.choice(DTYPES), pick.choice([1.0, 0.0, 0.7])
    hidden, ring = random_stream(shape, len(values), dtype, device, seed)
    weights = weights_of(pick.choice(["floats", "tensor", "per_sample"]), values, shape[0], device)
    (output,) = kernel.residual_forecast([hidden], [ring], weights, base)
    assert_rounded(output, expected_forecast(hidden, ring, weights, base), hidden)


@on_each_device
def test_offsets_beyond_32_bits(device: str) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free GPU memory")
    stride = 2**31  # between samples and between slots; memory in between is never touched, so the CPU never maps it
    hidden = torch.empty(stride + 8, dtype=torch.bfloat16, device=device).as_strided((2, 8), (stride, 1))
    ring = torch.empty(stride + 16, dtype=torch.bfloat16, device=device).as_strided((2, 2, 8), (stride, 8, 1))
    hidden.copy_(torch.arange(16).view(2, 8))
    ring.copy_(torch.arange(32).view(2, 2, 8))
    (output,) = kernel.residual_forecast([hidden], [ring], [1.0, 2.0], 1.0)
    assert torch.equal(output, hidden + ring[0] + 2 * ring[1])


@on_each_device
def test_tensors_of_middle_size(device: str) -> None:
    hidden, ring = random_stream((2, 1100, 257), 2, torch.bfloat16, device)
    (output,) = kernel.residual_forecast([hidden], [ring], [1.5, -0.5], 1.0)
    assert_rounded(output, expected_forecast(hidden, ring, [1.5, -0.5], 1.0), hidden)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_read_new_weights_on_replay() -> None:
    hidden, ring = random_stream((2, 512, 64), 2, torch.bfloat16, "cuda")
    weights = torch.tensor([1.0, 0.0], device="cuda")
    kernel.residual_forecast([hidden], [ring], weights, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (output,) = kernel.residual_forecast([hidden], [ring], weights, 1.0)
    for values in ([1.0, 0.0], [2.0, -1.0], [0.0, 0.5]):
        weights.copy_(torch.tensor(values))
        graph.replay()
        assert_rounded(output, expected_forecast(hidden, ring, values, 1.0), hidden)


@not_interpreting
def test_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@compiled_for_each_gpu
@pytest.mark.parametrize(
    ("dtype", "streams", "slots", "kind"),
    [
        (torch.bfloat16, 1, 1, "floats"),
        (torch.bfloat16, 2, 2, "floats"),
        (torch.bfloat16, 1, 3, "tensor"),
        (torch.bfloat16, 2, 4, "per_sample"),
        (torch.float16, 1, 2, "floats"),
        (torch.float16, 2, 3, "per_sample"),
        (torch.float32, 1, 1, "tensor"),
        (torch.float32, 2, 2, "floats"),
        (torch.float32, 1, 4, "floats"),
    ],
    ids=str,
)
def test_forecast_compiles_to_wide_loads_and_stores(
    capability: int, dtype: torch.dtype, streams: int, slots: int, kind: str
) -> None:
    hidden = [torch.empty((2, 512, 64), dtype=dtype)] * streams
    ring = [torch.empty((slots, 2, 512, 64), dtype=dtype)] * streams
    with compiling_for(capability) as binaries:
        kernel.residual_forecast(hidden, ring, weights_of(kind, [1.0] * slots, 2, "cpu"), 1.0)
    (binary,) = binaries
    assert_lean(binary, registers=56)
    assert binary.stores == {"128": 2 * streams}
    assert binary.loads["128"] == 2 * streams * (slots + 1)
    assert set(binary.loads) == ({"128"} if kind == "floats" else {"128", "32"})


@compiled_for_each_gpu
def test_numbers_that_change_do_not_compile_anew(capability: int) -> None:
    with compiling_for(capability) as binaries:
        for tokens in (512, 4096, 4608):
            hidden = torch.empty((1, tokens, 64), dtype=torch.bfloat16)
            for weights in ([1.0, 0.0], [16.0, 1.0], [0.3, -2.0]):
                for base in (0.0, 1.0, 0.5):
                    kernel.residual_forecast([hidden], [hidden.new_empty((2, *hidden.shape))], weights, base)
    assert len({id(binary.kernel) for binary in binaries}) == 1
