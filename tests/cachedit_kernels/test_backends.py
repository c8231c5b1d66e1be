"""Which implementation serves what, and how that is forced."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cachedit_kernels
from cachedit_kernels import _native
from operands import python

OPERATORS = {"residual_l1", "l1", "residual_push", "residual_forecast", "ring_gram", "merge_attention"}
OPERATORS |= {"ulysses_pack", "ulysses_unpack"}
OPERATORS |= {"residual_push_float8", "residual_forecast_float8", "ring_gram_float8"}
UNSET = {"CACHEDIT_KERNELS_BACKEND": None, "CACHEDIT_CPU_CAPABILITY": None, "TRITON_INTERPRET": None}
USE_ALL = """
import torch, cachedit_kernels as c
x, ring = torch.ones(2, 3), torch.zeros(2, 2, 3)
c.residual_push([x], [x * 3], [ring], 1)
c.residual_push([x], [x * 4], [ring], torch.tensor(0))
print(c.residual_l1([x], [x * 3], [x]).tolist(), c.residual_l1([x], [x], [x], True).tolist())
print(c.l1([x], [x * 2]).tolist())
print(c.residual_forecast([x], [ring], [1.0, 2.0])[0].tolist())
print(c.residual_forecast([x], [ring], torch.tensor([1.0, 2.0]), 0.0)[0].tolist())
print(c.ring_gram([ring]).tolist(), c.ring_gram([ring], [1], True).tolist())
codes, scales = ring.to(torch.float8_e4m3fn), [torch.ones(2, 2)]
c.residual_push([x], [x * 3], [codes], 1, scales)
c.residual_push([x], [x * 4], [codes], torch.tensor(0), scales)
print(c.residual_forecast([x], [codes], [1.0, 2.0], scales=scales)[0].tolist())
print(c.residual_forecast([x], [codes], torch.tensor([1.0, 2.0]), 0.0, scales)[0].tolist())
print(c.ring_gram([codes], scales=scales).tolist())
out, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
print(c.merge_attention(out, lse, 3 * out, lse)[0].tolist())
buffer = c.ulysses_pack([out, 2 * out], [1], 2, [True, False])
print(len(buffer), [t.tolist() for t in c.ulysses_unpack(buffer, out.shape, [1], 1, out.dtype, [True, False])])
"""
USED_ALL = """\
[[6.0, 6.0]] [[[3.0, 3.0], [3.0, 3.0]]]
[[6.0, 6.0]]
[[8.0, 8.0, 8.0], [8.0, 8.0, 8.0]]
[[7.0, 7.0, 7.0], [7.0, 7.0, 7.0]]
[[[54.0, 36.0], [36.0, 24.0]]] [[[[12.0]], [[12.0]]]]
[[8.0, 8.0, 8.0], [8.0, 8.0, 8.0]]
[[7.0, 7.0, 7.0], [7.0, 7.0, 7.0]]
[[[54.0, 36.0], [36.0, 24.0]]]
[[[[2.0, 2.0]]]]
48 [[[[[1.0, 1.0]]]], [[[[2.0, 2.0]]]]]
"""
needs_library = pytest.mark.skipif(not _native.PATH.exists(), reason="needs the compiled library")


def implementations(**environment: str) -> str:
    served = "{(d, b.implementation) for o in c.backends().values() for d, b in o.items()}"
    result = python(f"import cachedit_kernels as c; print({served})", **UNSET | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_backends_lists_every_operator_with_reasons() -> None:
    backends = cachedit_kernels.backends()
    assert set(backends) == OPERATORS
    for devices in backends.values():
        assert set(devices) == {"cpu", "cuda", "other"}
        assert all(isinstance(b, cachedit_kernels.Backend) and b.implementation and b.reason for b in devices.values())


def test_backends_hands_out_a_copy() -> None:
    cachedit_kernels.backends()["l1"].clear()
    assert cachedit_kernels.backends()["l1"]


@needs_library
def test_default() -> None:
    found = implementations()
    assert "('cpu', 'cpp')" in found and "('other', 'reference')" in found
    assert "('cuda', 'triton')" in found or "('cuda', 'reference')" in found


@pytest.mark.parametrize("forced", ["cpp", "reference", "triton"])
def test_a_forced_backend_serves_every_overload(forced: str) -> None:
    if forced == "cpp" and not _native.PATH.exists():
        pytest.skip("needs the compiled library")
    if forced == "triton":
        pytest.importorskip("triton")
    interpret = "1" if forced == "triton" else None
    environment = {**UNSET, "CACHEDIT_KERNELS_BACKEND": forced, "TRITON_INTERPRET": interpret}
    assert f"('cpu', '{forced}')" in implementations(**environment)
    result = python(USE_ALL, **environment)
    assert result.stdout == USED_ALL, result.stderr


@needs_library
def test_default_serves_every_overload() -> None:
    assert python(USE_ALL, **UNSET).stdout == USED_ALL


def test_forced_reference_refuses_in_the_same_words() -> None:
    code = "import torch, cachedit_kernels as c\ntry: c.l1([], [])\nexcept RuntimeError as e: print(e)"
    expected = "l1: previous must have at least one tensor, got an empty list\n"
    for forced in ("reference", None):
        assert python(code, **UNSET | {"CACHEDIT_KERNELS_BACKEND": forced}).stdout == expected


def test_unknown_backend_is_an_error_at_import() -> None:
    result = python("import cachedit_kernels", **UNSET | {"CACHEDIT_KERNELS_BACKEND": "fortran"})
    assert "CACHEDIT_KERNELS_BACKEND must be one of cpp, cuda, triton, reference, got 'fortran'" in result.stderr


def test_unknown_capability_is_an_error_at_import() -> None:
    result = python("import cachedit_kernels", **UNSET | {"CACHEDIT_CPU_CAPABILITY": "sse9"})
    assert "CACHEDIT_CPU_CAPABILITY must be one of default, avx2, avx512, got 'sse9'" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run Triton")
def test_forced_triton_without_a_device_is_an_error_at_import() -> None:
    result = python("import cachedit_kernels", **UNSET | {"CACHEDIT_KERNELS_BACKEND": "triton"})
    assert "CACHEDIT_KERNELS_BACKEND=triton needs a CUDA device, or TRITON_INTERPRET=1" in result.stderr


def test_a_backend_that_does_not_serve_a_device_says_so_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played without a CUDA device: what forced cpp registers for CUDA tensors, called with CPU tensors."""
    from cachedit_kernels import _backend

    monkeypatch.setenv("CACHEDIT_KERNELS_BACKEND", "cpp")
    monkeypatch.setattr(_native, "load", lambda: (True, "played"))
    monkeypatch.setattr(_backend, "_chosen", _backend._choose_forced("cpp"))
    for device in ("cuda", "other"):
        assert _backend._chosen["l1"][device].implementation == "none"
        call = _backend._python_implementation("l1", _backend.OPERATORS["l1"], device)
        with pytest.raises(RuntimeError, match="l1: no implementation for cpu tensors: CACHEDIT_KERNELS_BACKEND=cpp"):
            call([torch.ones(1)], [torch.ones(1)])


def test_forced_cuda_where_it_cannot_run_is_an_error_at_import() -> None:
    if _native.cuda()[0]:
        pytest.skip("this machine can run CUDA kernels")
    result = python("import cachedit_kernels", **UNSET | {"CACHEDIT_KERNELS_BACKEND": "cuda"})
    assert f"CACHEDIT_KERNELS_BACKEND=cuda, but {_native.cuda()[1]}" in result.stderr


@needs_library
@pytest.mark.parametrize(
    ("driver", "usable", "reason"),
    [
        (None, False, "there is no NVIDIA driver"),
        (12080, False, "the driver serves CUDA 12.8, and the library needs 13.0"),
        (13000, True, "CUDA 13.1, driver for 13.0"),
        (14020, True, "CUDA 13.1, driver for 14.2"),
    ],
)
def test_the_driver_decides_whether_cuda_kernels_run(
    monkeypatch: pytest.MonkeyPatch, driver: int | None, usable: bool, reason: str
) -> None:
    """With a library that was built by CUDA 13.1."""
    monkeypatch.setattr(_native, "load", lambda: (True, "played"))
    library = SimpleNamespace(cachedit_cuda_runtime_version=lambda: 13010)
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(_native, "driver_version", lambda: driver)
    assert _native.cuda()[0] == usable and reason in _native.cuda()[1]
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda _: SimpleNamespace())
    assert _native.cuda() == (False, "the compiled library was built without nvcc")


@pytest.mark.parametrize(
    ("triton", "serves", "usable", "expected", "reason"),
    [
        (True, "triton", True, "triton", "triton is installed; CUDA C++ is 0.9 times as fast on GPU A"),
        (True, "cuda", True, "cuda", "CUDA C++ is 1.1 times as fast on GPU A: played"),
        (True, "cuda", False, "triton", "CUDA C++ would be faster, but played"),
        (False, "triton", True, "cuda", "triton is not installed: played"),
        (False, "triton", False, "reference", "triton is not installed, and played"),
    ],
)
def test_what_serves_cuda_tensors(
    monkeypatch: pytest.MonkeyPatch, triton: bool, serves: str, usable: bool, expected: str, reason: str
) -> None:
    from cachedit_kernels import _backend

    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda _: object() if triton else None)
    ratio = "1.1" if serves == "cuda" else "0.9"
    monkeypatch.setitem(_backend.CUDA_DEFAULTS, "l1", {"serves": serves, "device": "GPU A", "cuda_over_triton": ratio})
    unmeasured = {"serves": "triton", "device": "", "cuda_over_triton": ""}
    monkeypatch.setitem(_backend.CUDA_DEFAULTS, "residual_l1", unmeasured)
    monkeypatch.setattr(_native, "cuda", lambda: (usable, "played"))
    assert _backend._default_for_cuda("l1") == (expected, reason)
    if triton:
        said = _backend._default_for_cuda("residual_l1").reason
        assert said == "triton is installed; CUDA C++ has not been measured"
    without_kernel = _backend._default_for_cuda("ring_gram")
    assert without_kernel.implementation == ("triton" if triton else "reference")
    monkeypatch.setattr(_native, "load", lambda: (True, "played"))
    if usable:
        forced = _backend._choose_forced("cuda")
        assert forced["l1"]["cuda"] == ("cuda", "forced by CACHEDIT_KERNELS_BACKEND: played")
        assert forced["l1"]["cpu"].implementation == "none" and forced["ring_gram"]["cuda"] == without_kernel


@pytest.fixture
def pure_copy(tmp_path: Path) -> Path:
    """The package without its compiled library."""
    shutil.copytree(
        Path(cachedit_kernels.__file__).parent,
        tmp_path / "cachedit_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return tmp_path


def test_without_the_library_reference_serves_and_one_warning_says_why(pure_copy: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(pure_copy)!r})\n" + USE_ALL + "\nprint(c.backends()['l1']['cpu'])"
    result = python(code, **UNSET)
    assert result.stdout.startswith(USED_ALL) and "implementation='reference'" in result.stdout, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert "there is no _C.so in" in result.stderr and "pip install" in result.stderr
    quiet = python(code, **UNSET | {"CACHEDIT_KERNELS_BACKEND": "reference"})
    assert quiet.stdout.startswith(USED_ALL) and not quiet.stderr


def test_forced_cpp_without_the_library_is_an_error_at_import(pure_copy: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(pure_copy)!r}); import cachedit_kernels"
    result = python(code, **UNSET | {"CACHEDIT_KERNELS_BACKEND": "cpp"})
    assert "RuntimeError: CACHEDIT_KERNELS_BACKEND=cpp, but there is no _C.so in" in result.stderr


def test_a_library_that_does_not_load_is_reported(pure_copy: Path) -> None:
    (pure_copy / "cachedit_kernels" / "_C.so").write_bytes(b"not a library")
    code = f"import sys; sys.path.insert(0, {str(pure_copy)!r}); import cachedit_kernels"
    assert "does not load" in python(code, **UNSET).stderr
    assert "RuntimeError" in python(code, **UNSET | {"CACHEDIT_KERNELS_BACKEND": "cpp"}).stderr


@pytest.mark.skipif(cachedit_kernels.backends()["l1"]["cpu"].implementation != "cpp", reason="needs the library")
def test_no_python_runs_below_a_compiled_operator() -> None:
    """A Python body would cost more than the whole call."""
    x, files = [torch.ones(3)], []
    sys.setprofile(lambda frame, event, _: files.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        torch.ops.cachedit.l1.default(x, x)
    finally:
        sys.setprofile(None)
    assert [file for file in files if not file.endswith("_ops.py")] == []


def test_versions_agree() -> None:
    from importlib.metadata import version

    assert version("cachedit-kernels") == cachedit_kernels.__version__
