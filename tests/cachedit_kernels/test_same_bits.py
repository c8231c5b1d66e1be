"""The same inputs give the same bits: again, on every instruction set, with any number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachedit_kernels import backends
from operands import python

# Everything the kernels do, hashed, with NaN made alike (which NaN comes out is not promised).
SCRIPT = """
import hashlib, torch
from cachedit_kernels import backends, residual_l1, l1, residual_push, residual_forecast, ring_gram
from cachedit_kernels import merge_attention, ulysses_pack, ulysses_unpack
from operands import DTYPES, LAYOUTS, SHAPES, make

def add(digest, tensors):
    for tensor in tensors:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
        small = tensor.numel() < 9
        digest.update(repr(tensor.tolist()).encode() if small else tensor.view(torch.uint8).numpy().tobytes())

def everything():
    digest = hashlib.sha256()
    for dtype in DTYPES:
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        every = every.view(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
        cases = [
            [make(shape, dtype, LAYOUTS[(i + j) % len(LAYOUTS)], i + j) for j in range(3)]
            for i, shape in enumerate([*SHAPES, (2, 300_000)])
        ]
        for before, after, anchor in (*cases, (every, every.flip(0), every.roll(77))):
            for per_sample in (False, True) if before.dim() else (False,):
                add(digest, [residual_l1([before], [after], [anchor], per_sample), l1([before], [after], per_sample)])
            ring = torch.zeros(2, *before.shape, dtype=before.dtype)
            residual_push([before], [after], [ring], 0)
            residual_push([after], [anchor], [ring], 1)
            add(digest, [ring])
            add(digest, residual_forecast([before], [ring], [1.7, -0.3]))
            add(digest, residual_forecast([before], [ring], [1e-3, 0.0], 1.01))
            if before.dim():
                codes = torch.zeros(2, *before.shape, dtype=torch.float8_e4m3fn)
                scales = torch.zeros(2, *before.shape[:-1])
                residual_push([before], [after], [codes], 0, [scales])
                residual_push([after], [anchor], [codes], 1, [scales])
                add(digest, [codes.float(), scales, ring_gram([codes], [1, 0], scales=[scales])])
                add(digest, residual_forecast([before], [codes], [1.7, -0.3], 1.01, [scales]))
            three = torch.stack([before, after, anchor])
            for per_sample in (False, True) if before.dim() else (False,):
                add(digest, [ring_gram([three], None, per_sample), ring_gram([three], [2, 0], per_sample)])
        for other in DTYPES if dtype == torch.float32 else (dtype,):
            out, out2 = (make((2, 3000, 3, 41), d, "token slice", i) for i, d in enumerate((dtype, other)))
            lse, lse2 = (30 * make((2, 3000, 3), torch.float32, "transposed", i) for i in range(2))
            add(digest, merge_attention(out, lse, out2, lse2))
        values = torch.where(every.isfinite(), every, 0).view(2, -1, 8, 64)
        for x, splits, dim in ((out, [2, 1], 2), (values, [40, 24], 1), (values[..., :41], [5, 3], 2)):
            buffer = ulysses_pack([x, x], splits, dim, [True, False])
            add(digest, [buffer, *ulysses_unpack(buffer, x.shape, splits, dim, dtype, [True, False])])
    return digest.hexdigest()

digests = set()
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    digests.add(everything())
print(backends()["l1"]["cpu"].reason, *digests, sep="|")
"""


def run(**environment: str) -> tuple[str, str]:
    result = python(SCRIPT, PYTHONPATH=str(Path(__file__).parents[1] / "helpers"), **environment)
    assert result.returncode == 0, result.stderr
    reason, *digests = result.stdout.strip().split("|")
    assert len(digests) == 1, f"{reason}: results depend on the number of threads"
    return reason, digests[0]


@pytest.mark.skipif(backends()["l1"]["cpu"].implementation != "cpp", reason="needs the compiled library")
def test_same_bits_on_every_instruction_set_with_any_number_of_threads() -> None:
    _, best = run()
    for capability in ("default", "avx2"):
        reason, lowered = run(CACHEDIT_CPU_CAPABILITY=capability)
        assert f"{capability} kernels" in reason or "default kernels" in reason
        assert lowered == best, reason


def test_same_bits_on_repetition() -> None:
    from cachedit_kernels import residual_l1

    x = [torch.randn(3, 100_001) for _ in range(3)]
    first = residual_l1(x[:1], x[1:2], x[2:])
    for _ in range(20):
        assert torch.equal(residual_l1(x[:1], x[1:2], x[2:]), first)
