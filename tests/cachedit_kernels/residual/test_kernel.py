"""The Triton kernels behind residual_l1, l1 and residual_push: values on a GPU or interpreted, and machine code."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from cachedit_kernels import launch
from cachedit_kernels.residual import kernel
from cachedit_kernels.testing.aot import assert_lean, compiled_for_each_gpu, compiling_for
from cachedit_kernels.testing.devices import INTERPRETING, kernel_devices, not_interpreting, run_under_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (3,), (5, 7), (2, 1, 16), (2, 33, 24), (1, 2, 3, 5, 7), (3, 257, 41), (0,), (2, 0, 8), (0, 4)]
on_each_device = pytest.mark.parametrize("device", kernel_devices())
for_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random_tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(count)]


def expected_sums(difference: Tensor, magnitude: Tensor, per_sample: bool) -> Tensor:
    if per_sample:
        return torch.stack([x[..., None].flatten(1).abs().sum(1) for x in (difference, magnitude)], 1)
    return torch.stack([x.abs().sum() for x in (difference, magnitude)])


def expected_residual_l1(before: list[Tensor], after: list[Tensor], anchor: list[Tensor], per_sample: bool) -> Tensor:
    triples = [[t.double() for t in triple] for triple in zip(before, after, anchor, strict=True)]
    return torch.stack([expected_sums((y - x) - a, a, per_sample) for x, y, a in triples])


def expected_l1(previous: list[Tensor], current: list[Tensor], per_sample: bool) -> Tensor:
    pairs = [[t.double() for t in pair] for pair in zip(previous, current, strict=True)]
    return torch.stack([expected_sums(p - c, p, per_sample) for p, c in pairs])


def assert_sums_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@on_each_device
@for_each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole", "per_sample"])
def test_sums_match_float64(device: str, dtype: torch.dtype, shape: tuple[int, ...], per_sample: bool) -> None:
    if per_sample and not shape:
        pytest.skip("a number has no samples")
    x, y, a = random_tensors(3, shape, dtype, device)
    assert_sums_close(kernel.residual_l1([x], [y], [a], per_sample), expected_residual_l1([x], [y], [a], per_sample))
    assert_sums_close(kernel.l1([x], [y], per_sample), expected_l1([x], [y], per_sample))


@on_each_device
@for_each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_push_rounds_once(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, y = random_tensors(2, shape, dtype, device)
    ring = torch.full((3, *shape), 7.0, dtype=dtype, device=device)
    kernel.residual_push([x], [y], [ring], 1)
    assert torch.equal(ring[1], (y.float() - x.float()).to(dtype))
    assert (ring[0] == 7).all() and (ring[2] == 7).all()


@on_each_device
@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_push_reads_its_slot_from_a_tensor(device: str, slot_dtype: torch.dtype) -> None:
    x, y = random_tensors(2, (2, 9, 8), torch.bfloat16, device)
    ring = torch.zeros((3, *x.shape), dtype=x.dtype, device=device)
    for i in (2, 0, 1):
        slot = torch.tensor(i, dtype=slot_dtype, device=device)
        kernel.residual_push([x * i], [y], [ring], slot if i else slot.reshape(1))
    for i in range(3):
        assert torch.equal(ring[i], (y.float() - (x * i).float()).to(x.dtype))


@on_each_device
@pytest.mark.parametrize("slot", [-1, 3])
def test_push_never_writes_outside_the_ring(device: str, slot: int) -> None:
    x, y = random_tensors(2, (2, 8), torch.float32, device)
    storage = torch.full((5, 2, 8), 7.0, device=device)
    kernel.residual_push([x], [y], [storage[1:4]], torch.tensor(slot, device=device))
    assert (storage == 7).all()


@on_each_device
@pytest.mark.parametrize("streams", [2, 4, 5, 9])
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole", "per_sample"])
def test_streams_may_differ_in_shape_and_dtype(device: str, streams: int, per_sample: bool) -> None:
    shapes = [(2, 70, 64), (2, 7, 24), (2, 0, 3), (2, 5), (2, 33, 3, 16)]
    lists: list[list[Tensor]] = [[], [], []]
    for s in range(streams):
        for tensors, tensor in zip(
            lists, random_tensors(3, shapes[s % len(shapes)], DTYPES[s % 3], device, seed=s), strict=True
        ):
            tensors.append(tensor)
    before, after, anchor = lists
    expected = expected_residual_l1(before, after, anchor, per_sample)
    assert_sums_close(kernel.residual_l1(before, after, anchor, per_sample), expected)
    assert_sums_close(kernel.l1(before, after, per_sample), expected_l1(before, after, per_sample))
    ring = [torch.zeros((2, *x.shape), dtype=x.dtype, device=device) for x in before]
    kernel.residual_push(before, after, ring, 1)
    for x, y, r in zip(before, after, ring, strict=True):
        assert torch.equal(r[1], (y.float() - x.float()).to(x.dtype))


def strided(x: Tensor, layout: str) -> Tensor:
    """The values of x [B, L, D] in another layout of memory."""
    if layout == "slice":  # contiguous within a sample
        y = x.new_full((x.shape[0], x.shape[1] + 3, x.shape[2]), math.nan)[:, 2:-1]
    elif layout == "transposed":
        y = x.new_empty((x.shape[2], x.shape[1], x.shape[0])).permute(2, 1, 0)
    elif layout == "every_other":
        y = x.new_full((x.shape[0], x.shape[1], 2 * x.shape[2]), math.nan)[..., ::2]
    elif layout == "padded_batch_of_one":
        y = x.new_full((2, *x.shape), math.nan)[:1].squeeze(0)
    else:
        raise ValueError(layout)
    return y.copy_(x)


@on_each_device
@pytest.mark.parametrize(
    "layouts", [("slice",) * 3, ("slice", "transposed", "every_other"), ("padded_batch_of_one",) * 3]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole", "per_sample"])
def test_strides_are_read_right(device: str, layouts: tuple[str, ...], batch: int, per_sample: bool) -> None:
    tensors = random_tensors(3, (batch, 45, 32), torch.bfloat16, device)
    x, y, a = (strided(t, layout) for t, layout in zip(tensors, layouts, strict=True))
    expected = expected_residual_l1(*([t] for t in tensors), per_sample)
    assert_sums_close(kernel.residual_l1([x], [y], [a], per_sample), expected)
    assert_sums_close(kernel.l1([x], [y], per_sample), expected_l1([x], [y], per_sample))
    ring = torch.zeros((4, batch, 45, 32), dtype=x.dtype, device=device)[1::2]
    kernel.residual_push([x], [y], [ring], 1)
    assert torch.equal(ring[1], (tensors[1].float() - tensors[0].float()).to(x.dtype))
    assert (ring[0] == 0).all()


@on_each_device
@pytest.mark.parametrize("seed", range(20))
def test_any_shape(device: str, seed: int) -> None:
    pick = random.Random(seed)
    shape = (pick.randint(1, 3), *(pick.randint(0, 40) for _ in range(pick.randint(0, 3))))
    dtype, per_sample, slot = pick.choice(DTYPES), pick.random() < 0.5, pick.randrange(3)
    x, y, a = random_tensors(3, shape, dtype, device, seed)
    assert_sums_close(kernel.residual_l1([x], [y], [a], per_sample), expected_residual_l1([x], [y], [a], per_sample))
    ring = torch.zeros((3, *shape), dtype=dtype, device=device)
    kernel.residual_push([x], [y], [ring], slot)
    assert torch.equal(ring[slot], (y.float() - x.float()).to(dtype))


@on_each_device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_their_sums_and_no_others(device: str, value: float) -> None:
    x, y, a = random_tensors(3, (3, 700), torch.bfloat16, device)
    y[1, 699] = value
    a[2, 0] = value
    sums = kernel.residual_l1([x], [y], [a], per_sample=True)[0]
    assert_sums_close(sums[None], expected_residual_l1([x], [y], [a], per_sample=True))
    assert (
        sums[0].isfinite().all() and not sums[1, 0].isfinite() and sums[1, 1].isfinite() and not sums[2, 1].isfinite()
    )
    assert not kernel.l1([x], [y])[0, 0].isfinite()
    ring = torch.zeros((1, 3, 700), dtype=x.dtype, device=device)
    kernel.residual_push([x], [y], [ring], 0)
    assert torch.equal(ring[0].isfinite(), y.isfinite())


@on_each_device
def test_equal_inputs_give_equal_bits_and_tickets_return_to_zero(device: str) -> None:
    shape = (2, 300, 64) if device == "cpu" else (2, 4096, 3072)
    x, y, a = random_tensors(3, shape, torch.float32, device)
    first = kernel.residual_l1([x], [y], [a], per_sample=True)
    for _ in range(3 if device == "cpu" else 200):
        assert torch.equal(first, kernel.residual_l1([x], [y], [a], per_sample=True))
    assert torch.equal(first, kernel.residual_l1([x.clone()], [y.clone()], [a.clone()], per_sample=True))
    assert launch.tickets_for(x.device, 1).sum() == 0


@on_each_device
def test_more_programs_than_one_final_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 2**20)
    monkeypatch.setattr(kernel, "FINAL_BLOCK", 16)
    x, y, a = random_tensors(3, (50, 1024), torch.float16, device)
    assert_sums_close(kernel.residual_l1([x], [y], [a]), expected_residual_l1([x], [y], [a], False))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_replay_beside_eager_launches() -> None:
    x, y, a = random_tensors(3, (2, 4096, 3072), torch.bfloat16, "cuda")
    ring, slot = (
        torch.zeros((2, *x.shape), dtype=x.dtype, device="cuda"),
        torch.zeros((), dtype=torch.int64, device="cuda"),
    )
    eager = kernel.residual_l1([x], [y], [a])
    kernel.residual_push([x], [y], [ring], slot)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.residual_l1([x], [y], [a])
        kernel.residual_push([x], [y], [ring], slot)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            graph.replay()
    for _ in range(20):
        assert torch.equal(eager, kernel.residual_l1([x], [y], [a]))
    torch.cuda.synchronize()
    assert torch.equal(eager, captured)
    ring.zero_()
    slot.fill_(1)
    graph.replay()
    assert (ring[0] == 0).all() and torch.equal(ring[1], (y.float() - x.float()).to(x.dtype))


@on_each_device
def test_tensors_of_middle_size(device: str) -> None:
    x, y, a = random_tensors(3, (2, 1100, 257), torch.bfloat16, device)
    for per_sample in (False, True):
        assert_sums_close(
            kernel.residual_l1([x], [y], [a], per_sample), expected_residual_l1([x], [y], [a], per_sample)
        )
    ring = torch.zeros((2, *x.shape), dtype=x.dtype, device=device)
    kernel.residual_push([x], [y], [ring], 1)
    assert torch.equal(ring[1], (y.float() - x.float()).to(x.dtype))


@on_each_device
def test_offsets_beyond_32_bits(device: str) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free GPU memory")
    stride = 2**31  # between samples and between slots; memory in between is never touched, so the CPU never maps it
    x = torch.empty(stride + 8, dtype=torch.bfloat16, device=device).as_strided((2, 8), (stride, 1))
    x.copy_(torch.arange(16).view(2, 8))
    ring = torch.empty(stride + 16, dtype=torch.bfloat16, device=device).as_strided((2, 2, 8), (stride, 8, 1))
    assert kernel.l1([x], [x * 2], per_sample=True).tolist() == [[[28.0, 28.0], [92.0, 92.0]]]
    kernel.residual_push([x], [x * 3], [ring], 1)
    assert torch.equal(ring[1], x * 2)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_32_bits_of_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    n = 2**31 + 4096
    x, y, ring = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    y[-5:] = 2
    assert kernel.l1([x], [y]).tolist() == [[10.0, 0.0]]
    kernel.residual_push([x], [y], [ring[None]], 0)
    assert ring[-5:].eq(2).all() and ring.count_nonzero() == 5


@not_interpreting
def test_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@compiled_for_each_gpu
@for_each_dtype
@pytest.mark.parametrize("streams", [1, 2])
def test_reduction_compiles_to_wide_loads(capability: int, dtype: torch.dtype, streams: int) -> None:
    x = [torch.empty((2, 512, 64), dtype=dtype)] * streams
    with compiling_for(capability) as binaries:
        kernel.residual_l1(x, x, x)
        kernel.l1(x, x)
    vectors = 16 * kernel.REDUCE_BLOCK[dtype.itemsize] * dtype.itemsize // (32 * kernel.NUM_WARPS * 16 * 16)
    for binary, tensors in zip(binaries, (3, 2), strict=True):
        assert_lean(binary, registers=64)
        assert binary.loads["128"] == streams * tensors * vectors
        assert set(binary.loads) == {"128", "32"}  # 32: the partials that the last program adds


@compiled_for_each_gpu
@for_each_dtype
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("slot", [1, torch.tensor(1)], ids=["int", "tensor"])
def test_push_compiles_to_wide_loads_and_stores(
    capability: int, dtype: torch.dtype, streams: int, slot: int | Tensor
) -> None:
    x = [torch.empty((2, 512, 64), dtype=dtype)] * streams
    with compiling_for(capability) as binaries:
        kernel.residual_push(x, x, [torch.empty((3, 2, 512, 64), dtype=dtype)] * streams, slot)
    (binary,) = binaries
    assert_lean(binary, registers=48)
    assert set(binary.stores) == {"128"}
    assert set(binary.loads) == ({"128"} if isinstance(slot, int) else {"128", "64"})


@compiled_for_each_gpu
def test_slices_are_read_in_wide_loads_where_they_lie(capability: int) -> None:
    x = torch.empty((2, 80, 64), dtype=torch.bfloat16)[:, 16:]
    with compiling_for(capability) as binaries:
        kernel.residual_l1([x], [x], [x])
        kernel.residual_l1([x], [x], [x], per_sample=True)
    for binary in binaries:
        assert_lean(binary, registers=64)
        assert binary.loads["128"] == 3


@compiled_for_each_gpu
def test_numbers_that_change_do_not_compile_anew(capability: int) -> None:
    with compiling_for(capability) as binaries:
        for tokens in (512, 4096, 4608):
            x = torch.empty((1, tokens, 64), dtype=torch.bfloat16)
            for slot in (0, 1, 2, 16):
                kernel.residual_push([x], [x], [x.new_empty((20, *x.shape))], slot)
            kernel.residual_l1([x], [x], [x])
    assert len({id(binary.kernel) for binary in binaries}) == 2
