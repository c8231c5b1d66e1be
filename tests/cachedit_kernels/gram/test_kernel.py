"""The Triton kernel behind ring_gram: values on a GPU or interpreted, and machine code."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cachedit_kernels.gram import kernel, reference
from cachedit_kernels.testing.aot import assert_lean, compiled_for_each_gpu, compiling_for
from cachedit_kernels.testing.devices import INTERPRETING, kernel_devices, not_interpreting, run_under_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (3,), (5, 7), (2, 1, 16), (2, 33, 24), (1, 2, 3, 5, 7), (3, 257, 41), (0,), (2, 0, 8), (0, 4)]
on_each_device = pytest.mark.parametrize("device", kernel_devices())
for_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random_ring(shape: Sequence[int], slots: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn((slots, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_gram(got: Tensor, ring: list[Tensor], slots: list[int] | None = None, per_sample: bool = False) -> None:
    expected = reference.ring_gram([r.double() for r in ring], slots, per_sample)
    magnitudes = reference.ring_gram([r.double().abs() for r in ring], slots, per_sample)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert torch.equal(got, got.mT)
    assert ((got.double() - expected).abs() <= 3e-7 * magnitudes).all()


@on_each_device
@for_each_dtype
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_float64(device: str, dtype: torch.dtype, per_sample: bool, shape: tuple[int, ...]) -> None:
    if per_sample and not shape:
        pytest.skip("a number has no samples")
    ring = random_ring(shape, 4, dtype, device)
    assert_gram(kernel.ring_gram([ring], None, per_sample), [ring], None, per_sample)


@on_each_device
@pytest.mark.parametrize("slots", [0, 1, 2, 3, 4, 6, 7, 9, 16])
def test_any_number_of_slots(device: str, slots: int) -> None:
    ring = random_ring((2, 30, 24), slots, torch.bfloat16, device)
    assert_gram(kernel.ring_gram([ring]), [ring])


@on_each_device
def test_only_the_slots_asked_for_are_read(device: str) -> None:
    ring = random_ring((2, 50, 16), 5, torch.float32, device)
    ring[3:] = math.nan
    for slots in ([2, 0], [1], [0, 1, 2], [1, 1]):
        for per_sample in (False, True):
            assert_gram(kernel.ring_gram([ring], slots, per_sample), [ring], slots, per_sample)


@on_each_device
@pytest.mark.parametrize("streams", [2, 4, 5, 9])
def test_streams_may_differ_in_shape_and_dtype(device: str, streams: int) -> None:
    shapes = [(2, 70, 64), (2, 7, 24), (2, 0, 3), (2, 5), (2, 33, 3, 16)]
    ring = [random_ring(shapes[s % 5], 3, DTYPES[s % 3], device, seed=s) for s in range(streams)]
    for per_sample in (False, True):
        assert_gram(kernel.ring_gram(ring, [2, 0], per_sample), ring, [2, 0], per_sample)


@on_each_device
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("layout", ["ring_slice", "transposed", "every_other"])
def test_strides_are_read_right(device: str, per_sample: bool, layout: str) -> None:
    ring = random_ring((3, 20, 32), 3, torch.float16, device)
    if layout == "ring_slice":
        ring = ring.new_full((6, 3, 24, 32), math.nan)[::2, :, 3:-1].copy_(ring)
    elif layout == "transposed":
        ring = ring.new_empty((32, 3, 20, 3)).permute(1, 3, 2, 0).copy_(ring)
    else:
        ring = ring.new_full((3, 3, 20, 64), math.nan)[..., ::2].copy_(ring)
    assert_gram(kernel.ring_gram([ring], [2, 0], per_sample), [ring], [2, 0], per_sample)


@on_each_device
@pytest.mark.parametrize("seed", range(10))
def test_any_shape(device: str, seed: int) -> None:
    pick = random.Random(seed)
    shape = (pick.randint(1, 3), *(pick.randint(0, 40) for _ in range(pick.randint(0, 3))))
    ring = random_ring(shape, pick.randint(1, 6), pick.choice(DTYPES), device, seed)
    per_sample = pick.random() < 0.5
    assert_gram(kernel.ring_gram([ring], None, per_sample), [ring], None, per_sample)


@on_each_device
def test_tensors_of_middle_size_give_the_same_bits_again(device: str) -> None:
    ring = random_ring((2, 1100, 129), 4, torch.bfloat16, device)
    first = kernel.ring_gram([ring])
    assert_gram(first, [ring])
    for _ in range(3):
        assert torch.equal(kernel.ring_gram([ring]), first)


@on_each_device
def test_offsets_beyond_32_bits(device: str) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free GPU memory")
    stride = 2**31  # memory in between is never touched, so the CPU never maps it
    ring = torch.empty(stride + 16, dtype=torch.bfloat16, device=device).as_strided((2, 2, 8), (stride, 8, 1))
    ring.copy_(torch.arange(32).view(2, 2, 8))
    assert_gram(kernel.ring_gram([ring]), [ring])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="no CUDA device")
def test_large_tensors_on_a_gpu() -> None:
    ring = random_ring((1, 4608, 3072), 6, torch.bfloat16, "cuda")
    first = kernel.ring_gram([ring])
    assert_gram(first, [ring])
    assert all(torch.equal(kernel.ring_gram([ring]), first) for _ in range(5))


@not_interpreting
def test_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@compiled_for_each_gpu
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "slots", "width", "registers"),
    [
        (torch.bfloat16, 2, "128", 64),
        (torch.bfloat16, 4, "64", 96),
        (torch.float16, 6, "64", 168),
        (torch.bfloat16, 8, "32", 168),
        (torch.float32, 4, "128", 96),
        (torch.float32, 6, "128", 168),
        (torch.float32, 16, "32", 255),
    ],
    ids=str,
)
def test_gram_reads_each_slot_once_without_spilling(
    capability: int, dtype: torch.dtype, slots: int, width: str, registers: int, streams: int
) -> None:
    with compiling_for(capability) as binaries:
        kernel.ring_gram([torch.empty((slots, 2, 512, 64), dtype=dtype)] * streams)
    (binary,) = binaries
    assert_lean(binary, registers)
    assert binary.loads[width] >= streams * slots


@compiled_for_each_gpu
def test_numbers_that_change_do_not_compile_anew(capability: int) -> None:
    with compiling_for(capability) as binaries:
        for tokens in (512, 4096, 4608):
            ring = torch.empty((5, 1, tokens, 64), dtype=torch.bfloat16)
            for slots in ([0, 1, 2, 3], [3, 4, 0, 1]):
                kernel.ring_gram([ring], slots)
    assert len({id(binary.kernel) for binary in binaries}) == 1
