"""Steps as CUDA graphs: on the host with tests/native/cudart.cpp for a CUDA runtime, ahead of time, and on a GPU."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from ctypes import c_char, c_char_p, c_int, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch

import cachedit_kernels as kernels
from cachedit_kernels import graphs
from cachedit_kernels.graphs import Control, Progress, Record, Rules, StepGraph
from decisions import STEP_SKIPPED, by_the_engine
from native import NVCC, build_cuda

KERNEL_NODE, HOST_NODE = 0, 3  # cudaGraphNodeType


class Runtime:
    """The runtime that writes letters: graphs of one node each."""

    def __init__(self, library: ctypes.CDLL):
        self.graph = library.fake_graph
        self.graph.restype, self.graph.argtypes = c_void_p, [c_char, c_int]
        self.log = library.fake_log
        self.log.restype = c_char_p
        self.driver = library.fake_driver
        self.start = len(self.log())

    def letter(self, letter: str, kind: int = KERNEL_NODE) -> Any:
        handle = self.graph(letter.encode(), kind)
        return type("Captured", (), {"raw_cuda_graph": lambda self: handle})()

    @property
    def written(self) -> str:
        return self.log().decode()[self.start :]


@pytest.fixture
def runtime(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    functions = graphs.bind(library)
    monkeypatch.setattr(graphs, "_functions", lambda: functions)
    runtime = Runtime(library)
    yield runtime
    runtime.driver(13000)


def random_diffs(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    diffs = [rng.choice((0.0, 0.03, 0.08, 0.2)) for _ in range(count)]
    diffs[rng.randrange(count)] = float("nan")
    return torch.tensor(diffs).tolist()  # as float32 has them


@pytest.mark.parametrize("order", [0, 1, 4])
def test_steps_run_as_the_engine_decides(runtime: Runtime, order: int) -> None:
    diffs, skips = random_diffs(60, order), [STEP_SKIPPED * (step in (20, 21)) for step in range(60)]
    settings = {
        "residual_diff_threshold": 0.1,
        "max_warmup_steps": 3,
        "max_continuous_cached_steps": 3,
        "max_accumulated_residual_diff_threshold": 0.15,
        "force_refresh_step_hint": 30,
    }
    expected, _ = by_the_engine(settings, None, order, diffs, skips)
    control = Control(
        Rules(
            threshold=0.1,
            warmup=3,
            max_continuous_cached_steps=3,
            accumulated_limit=0.15,
            refresh_hint=30,
            order=order,
        ),
        "cpu",
    )
    sums = torch.zeros(1, 2)
    with StepGraph("cpu") as step:
        step.add(runtime.letter("h"))
        step.branch(control, sums, reuse=runtime.letter("r"), compute=runtime.letter("c"))
        step.add(runtime.letter("t"))
        launch = step.instantiate()
        for diff, skip, (number, reused, _, _, slot, weights) in zip(diffs, skips, expected):
            if skip:
                control.set_step(number)
            sums.copy_(torch.tensor([[diff, 1.0]]))
            launch()
            assert runtime.written[-3:] == ("hrt" if reused else "hct")
            if reused:
                torch.testing.assert_close(control.weights[0], torch.tensor(weights), rtol=1e-6, atol=0)
                assert control.weights[1].tolist() == [float(k == control.slot) for k in range(order + 1)]
            else:
                assert control.slot == slot
    assert len(runtime.written) == 3 * 60 and {"r", "c"} < set(runtime.written)
    assert repr(control.records()) == repr([Record(*row[:4]) for row in expected])  # NaN equals NaN in words
    control.begin()
    assert control.records() == []


def test_several_decisions_in_one_step(runtime: Runtime) -> None:
    often, never = Control(Rules(threshold=0.1), "cpu"), Control(Rules(threshold=0.01), "cpu")
    sums = torch.tensor([[0.05, 1.0]])
    with StepGraph("cpu") as step:
        step.branch(often, sums, reuse=runtime.letter("r"), compute=runtime.letter("c"))
        step.branch(never, sums, reuse=runtime.letter("R"), compute=runtime.letter("C"))
        launch = step.instantiate()
        launch()
        launch()
    assert runtime.written == "cCrC"


def test_static_mask_leaves_the_choice_to_the_host(runtime: Runtime) -> None:
    mask = [1, 1, 0, 0, 1, 0]
    control = Control(Rules(mask=mask, mask_is_static=True, order=1), "cpu")
    with StepGraph("cpu") as compute, StepGraph("cpu") as reuse:
        launches = {}
        for step, name in ((compute, "c"), (reuse, "r")):
            step.policy(control)
            step.add(runtime.letter(name))
            launches[name] = step.instantiate()
        for computed in mask:
            launches["c" if computed else "r"]()
    assert runtime.written == "ccrrcr"
    assert [record.reused for record in control.records()] == [not computed for computed in mask]
    torch.testing.assert_close(control.weights[0], torch.tensor([4 / 3, -1 / 3]))  # slot 0 holds step 4, slot 1 step 1


def test_what_a_branch_may_not_hold_is_refused(runtime: Runtime) -> None:
    control, sums = Control(Rules(), "cpu"), torch.zeros(1, 2)
    with StepGraph("cpu") as step:
        with pytest.raises(RuntimeError, match=r"compute: a body .* not a node of type 3 \(host function\)"):
            step.branch(control, sums, reuse=runtime.letter("r"), compute=runtime.letter("c", HOST_NODE))
        runtime.driver(12040)
        with pytest.raises(RuntimeError, match=r"needs a driver for CUDA 12\.8, this one is for 12\.4"):
            step.branch(control, sums, reuse=runtime.letter("r"), compute=runtime.letter("c"))
        with pytest.raises(ValueError, match=r"sums must be float32 \[S, 2\] on cpu, got torch\.float64 \[1, 2\]"):
            step.branch(control, sums.double(), reuse=runtime.letter("r"), compute=runtime.letter("c"))
        launch = step.instantiate()
        launch()  # nothing was half added
    assert runtime.written == ""


def test_what_cuda_says_is_passed_on(runtime: Runtime) -> None:
    nothing = type("Captured", (), {"raw_cuda_graph": lambda self: 0})()
    with (
        StepGraph("cpu") as step,
        pytest.raises(RuntimeError, match=r"step_add: cudaGraphAddChildGraphNode.*invalid argument"),
    ):
        step.add(nothing)


def test_what_the_device_cannot_hold_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="order: expected 0 to 4, got 5"):
        Control(Rules(order=5), "cpu")
    with pytest.raises(ValueError, match="mask: expected at most 1024 steps, got 1025"):
        Control(Rules(mask=[1] * 1025), "cpu")
    control = Control(Rules(order=1), "cpu")
    before = control.memory.clone()
    with pytest.raises(ValueError, match="steps: expected at most 2 and a slot below it, got 3 and slot 0"):
        control.begin(Progress(steps=(3, 2, 1)))
    with pytest.raises(ValueError, match=r"rules\.order must be 1, as the control was made for, got 2"):
        control.begin(rules=Rules(order=2))
    assert torch.equal(control.memory, before)


def test_more_steps_than_are_recorded(runtime: Runtime) -> None:
    control = Control(Rules(), "cpu")
    with StepGraph("cpu") as step:
        step.policy(control)
        launch = step.instantiate()
        for _ in range(graphs.MAX_RECORDS + 1):
            launch()
    assert [record.step for record in control.records()] == list(range(graphs.MAX_RECORDS))


def test_without_the_cuda_part_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graphs._native, "PATH", tmp_path / "_C.so")
    graphs._functions.cache_clear()
    with pytest.raises(RuntimeError, match="cachedit_kernels was built without its CUDA part"):
        Control(Rules(), "cpu")
    graphs._functions.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, str]:
    if NVCC is None:
        pytest.skip("needs nvcc")
    path = tmp_path_factory.mktemp("cuda") / "graphs.so"
    assembler = build_cuda(path, "csrc/cuda/policy.cu", "csrc/cuda/graphs.cpp")
    return ctypes.CDLL(str(path)), assembler


def test_compiles_for_both_architectures(compiled: tuple[ctypes.CDLL, str]) -> None:
    library, assembler = compiled
    lines = assembler.splitlines()
    for architecture in ("sm_89", "sm_90a"):
        (entry,) = [i for i, line in enumerate(lines) if "policy_step" in line and f"'{architecture}'" in line]
        assert "0 bytes spill stores, 0 bytes spill loads" in lines[entry + 2]
    assert graphs.bind(library)["control_bytes"]() > 0  # it loads where there is no GPU


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed library, or one built for the test."""
    try:
        graphs._functions()
    except RuntimeError:
        functions = graphs.bind(request.getfixturevalue("compiled")[0])
        monkeypatch.setattr(graphs, "_functions", lambda: functions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("order", [0, 2])
def test_on_a_gpu(order: int) -> None:
    """A small body, decided on the device, against the same operators with the engine's decisions."""
    torch.manual_seed(0)
    width, steps = 256, 24
    weight = torch.randn(width, width, device="cuda") / 16
    inputs = torch.randn(1, 64, width, device="cuda") + 0.05 * torch.randn(steps, 64, width, device="cuda").cumsum(0)
    x = inputs[:1].clone()
    anchor, ring = torch.zeros_like(x), torch.zeros(order + 1, *x.shape, device="cuda")
    out, result = torch.empty_like(x), torch.empty_like(x)
    control = Control(Rules(threshold=0.1, warmup=3, max_continuous_cached_steps=3, order=order))
    held: dict[str, torch.Tensor] = {}

    def head() -> None:
        held["y"] = torch.tanh(x) + x
        held["sums"] = kernels.residual_l1([x], [held["y"]], [anchor])

    def compute() -> None:
        out.copy_(held["y"] + held["y"] @ weight)
        kernels.residual_push([held["y"]], [out], [ring], control.slot)
        kernels.residual_push([x], [held["y"]], [anchor[None]], 0)

    def reuse() -> None:
        out.copy_(kernels.residual_forecast([held["y"]], [ring], control.weights[0])[0])

    def tail() -> None:
        torch.mul(out, 2.0, out=result)

    def capture(piece: Callable[[], None]) -> torch.cuda.CUDAGraph:
        piece()  # compiles what has to be compiled
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            piece()
        return graph

    pieces = {piece.__name__: capture(piece) for piece in (head, compute, reuse, tail)}
    with StepGraph() as step:
        step.add(pieces["head"])
        step.branch(control, held["sums"], reuse=pieces["reuse"], compute=pieces["compute"])
        step.add(pieces["tail"])
        launch = step.instantiate()
    control.begin()
    results = []
    for step_input in inputs:
        x.copy_(step_input[None])
        launch()
        results.append(result.clone())
    records = control.records()

    diffs = [0.0 if record.diff is None else record.diff for record in records]
    settings = {"residual_diff_threshold": 0.1, "max_warmup_steps": 3, "max_continuous_cached_steps": 3}
    expected, _ = by_the_engine(settings, None, order, diffs, [0] * steps)
    assert records == [Record(*row[:4]) for row in expected] and {record.reused for record in records} == {True, False}
    for step_input, got, (_, reused, _, _, slot, weights) in zip(inputs, results, expected):
        x.copy_(step_input[None])
        y = torch.tanh(x) + x
        if reused:
            body = kernels.residual_forecast([y], [ring], weights)[0]
        else:
            body = y + y @ weight
            kernels.residual_push([y], [body], [ring], slot)
        torch.testing.assert_close(got, body * 2.0)
