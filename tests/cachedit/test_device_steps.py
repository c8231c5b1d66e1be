"""Steps that the device decides, against the eager engine: on a CUDA runtime that the tests bring, and on a GPU."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

import cachedit
from cachedit import DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig, store
from cachedit.controller import controller_of
from cachedit.cuda_graphs import ForwardGraphs
from cachedit_kernels import graphs as step_graphs
from captures import Composes
from toys import Shaped, SingleBlock, flux_inputs, make_toy, run_toy, tiny_flux, toy_inputs

STEPS = 10
DYNAMIC = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.4}
STATIC = {"steps_computation_mask": [1, 1, 0, 1, 0, 0, 1, 0, 0, 1], "steps_computation_policy": "static"}


@pytest.fixture
def read_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each time that decisions were read back, how many there were."""
    counts: list[int] = []
    original = step_graphs.Control.records

    def records(self: Any) -> Any:
        result = original(self)
        counts.append(len(result))
        return result

    monkeypatch.setattr(step_graphs.Control, "records", records)
    return counts


def enable(
    model: Any, calibrator: Any = None, backend: Composes | None = None, adapter: Any = None, **settings: Any
) -> Any:
    """The cache on a model, with graphs if there is a backend."""
    target = model if adapter is None else adapter
    cachedit.enable_cache(target, DBCacheConfig(**(DYNAMIC | {"num_inference_steps": STEPS} | settings)), calibrator)
    controller = controller_of(model)
    if backend is not None:
        controller.graphs = ForwardGraphs(controller, backend=backend)
    return controller.graphs


def records(model: Any) -> list[Any]:
    return [
        (name, branch.records, branch.nonfinite_diffs, branch.bytes_held)
        for entry in cachedit.summary(model, logging=False)
        for name, branch in entry.branches.items()
    ]


def alike(ours: Any, eager: Any) -> None:
    """The same outputs and the same records, NaN being NaN."""
    torch.testing.assert_close(ours[0], eager[0], rtol=0, atol=0, equal_nan=True)
    assert repr(ours[1:]) == repr(eager[1:])


CALIBRATORS = {
    "plain": None,
    "order 1": TaylorSeerCalibratorConfig(),
    "order 3": TaylorSeerCalibratorConfig(taylorseer_order=3),
    "one stream": TaylorSeerCalibratorConfig(enable_encoder_calibrator=False),
    "outputs kept": TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states"),
}


@pytest.mark.parametrize("pattern", [ForwardPattern.Pattern_0, ForwardPattern.Pattern_2, ForwardPattern.Pattern_3])
@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("in_place", [False, True])
def test_requests_one_after_the_other(
    backend: Composes, read_back: list[int], pattern: ForwardPattern, calibrator: str, in_place: bool
) -> None:
    results = []
    for its in (None, backend):
        model = make_toy(pattern=pattern, in_place=in_place)
        graphs = enable(model, CALIBRATORS[calibrator], its)
        results.append(([output for seed in range(3) for output in run_toy(model, STEPS, seed=seed)], records(model)))
    alike(results[1], results[0])
    assert graphs.replays == 3 * STEPS - 2 and graphs.eager == {"the first of its kind": 2 - 1}, graphs
    assert backend.pieces == 3 and backend.captures == 0  # head, reused, computed
    assert read_back == [STEPS - 2, STEPS, STEPS]  # at the end of each request, and not before
    verdicts = {record.reused for record in records(model)[0][1] if record.diff is not None}
    assert verdicts == {True, False}


def settings_of(rng: random.Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "residual_diff_threshold": rng.choice((0.1, 0.2, 0.3, 0.8, math.inf, 0.0)),
        "max_accumulated_residual_diff_threshold": rng.choice((None, 0.15, 0.4)),
        "max_warmup_steps": rng.choice((0, 1, 3, 5)),
        "warmup_interval": rng.choice((1, 2)),
        "max_cached_steps": rng.choice((-1, -1, 3)),
        "max_continuous_cached_steps": rng.choice((-1, -1, 2)),
        "force_refresh_step_hint": rng.choice((None, None, 4)),
        "force_refresh_step_policy": rng.choice(("once", "repeat")),
        "residual_float8": rng.random() < 0.2,
    }
    if rng.random() < 0.3:
        chosen["steps_computation_mask"] = [int(rng.random() < 0.4) for _ in range(STEPS)]
    return chosen


def script_of(rng: random.Random) -> list[tuple[Any, ...]]:
    """Two requests of two branches that take turns; a branch may skip steps, someone may look, inputs may change."""
    script: list[tuple[Any, ...]] = []
    where = {"a": 0, "b": 0}
    changes = {key: rng.choice((None, None, rng.randrange(2 * STEPS))) for key in where}
    for _ in range(3 * STEPS):
        key = rng.choice("ab")
        step = where[key]
        where[key] += 1
        tokens = 5 if changes[key] is None or step < changes[key] else 7
        kind = "nan" if step == 13 and key == "b" else "strided" if rng.random() < 0.15 else ""
        script.append((key, "cond", step, tokens, kind))
        if not (key == "a" and step % STEPS in (5, 6)):
            script.append((key, "uncond", step, tokens, ""))
        if rng.random() < 0.1:
            script.append((key, "summary", step, 0, ""))
    return script


def play(model: Any, script: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    outputs, seen = [], []
    for key, what, step, tokens, kind in script:
        with cachedit.request(model, key, STEPS):
            if what == "summary":
                seen.append(records(model))
                continue
            inputs = toy_inputs(step % STEPS, STEPS, tokens=tokens, seed=3 * (key == "a") + (what == "cond"))
            if kind == "nan":
                inputs["hidden_states"][0, 0, 0] = math.nan
            if kind == "strided":  # a graph of its own, on the same buffers
                inputs["hidden_states"] = inputs["hidden_states"].mT.contiguous().mT
            with torch.no_grad(), controller_of(model).cache_context(what):
                outputs.append(model(**inputs))
    for key in "ab":
        with cachedit.request(model, key):
            seen.append(records(model))
    return outputs, seen


def test_random_requests_that_take_turns(backend: Composes) -> None:
    reasons: Counter[tuple[str, bool]] = Counter()
    for seed in range(24):
        rng = random.Random(seed)
        settings, script, order = settings_of(rng), script_of(rng), rng.randrange(4)
        calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        results = []
        for its in (None, backend):
            model = make_toy()
            graphs = enable(model, calibrator, its, **settings)
            results.append(play(model, script))
        alike(results[1], results[0])
        assert graphs.replays > len(script) / 2, graphs
        assert set(graphs.eager) == {"the first of its kind"}, graphs
        for branches in results[1][1]:
            reasons.update((record.reason, record.reused) for branch in branches for record in branch[1])
    expected = {(reason, False) for reason in step_graphs.REASONS} | {("diff", True), ("learning", False)}
    assert set(reasons) == expected, reasons


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "ChromaTransformer2DModel"])
def test_lists_that_decide_separately(backend: Composes, name: str) -> None:
    """The first list reuses where the second computes and the other way round, and a mask may be static in one."""
    from first_blocks import CASES  # imports diffusers, which machines with GPUs may lack

    for policy in ("dynamic", "static"):
        results = []
        for its in (None, backend):
            torch.manual_seed(0)
            model = CASES[name].build()
            model = type(model).from_config({**model.config, "num_layers": 2, "num_single_layers": 2})
            model.eval().requires_grad_(False)
            call = CASES[name].call()
            common = DYNAMIC | {"num_inference_steps": 6, "residual_diff_threshold": 10.0}
            first = DBCacheConfig(**common, steps_computation_mask=[1, 1, 0, 1, 0, 0], steps_computation_policy=policy)
            second = DBCacheConfig(**common, steps_computation_mask=[1, 1, 1, 0, 0, 1])
            modifiers = [cachedit.ParamsModifier(each) for each in (first, second)]
            cachedit.enable_cache(model, DBCacheConfig(**common), params_modifiers=modifiers)
            controller = controller_of(model)
            controller.graphs = None if its is None else ForwardGraphs(controller, backend=its)
            with torch.no_grad():
                outputs = [model(**call | {"timestep": call["timestep"] * s / 6})[0] for s in range(12)]
            results.append((outputs, records(model)))
        alike(results[1], results[0])
        assert controller.graphs.replays == 11
    assert backend.pieces == 2 * 5  # the head, and then what follows each decision


def test_a_whole_transformer_and_its_output_class(backend: Composes) -> None:
    results = []
    for its in (None, backend):
        model = tiny_flux()
        graphs = enable(model, TaylorSeerCalibratorConfig(), its)
        with torch.inference_mode():
            outputs = [model(**flux_inputs(step, STEPS)).sample for step in range(2 * STEPS)]
        results.append((outputs, records(model)))
    alike(results[1], results[0])
    assert graphs.replays == 2 * STEPS - 1 and {record.reused for record in records(model)[0][1]} == {True, False}


def test_blocks_that_are_compiled(backend: Composes) -> None:
    results = []
    for its in (None, backend):
        model = make_toy(depth=4)
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
        adapter = cachedit.BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
        graphs = enable(model, None, its, adapter, Fn_compute_blocks=2)
        results.append((run_toy(model, STEPS), records(model)))
    alike(results[1], results[0])
    assert graphs.replays == STEPS - 1 and backend.pieces == 3


def test_the_host_takes_back_what_the_device_cannot_go_on_with(
    backend: Composes, read_back: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More steps than are recorded; memory taken away; a forward that raises; another configuration; the cache off."""
    monkeypatch.setattr("cachedit.device_steps.MAX_RECORDS", 3)
    results = []
    for its in (None, backend):
        model = make_toy()
        graphs = enable(model, TaylorSeerCalibratorConfig(), its, max_continuous_cached_steps=2)
        with torch.no_grad():
            outputs = run_toy(model, STEPS) + run_toy(model, STEPS)
            first = records(model)
            outputs += [model(**toy_inputs(step, STEPS)) for step in range(5)]
            with cachedit.request(model, "other"):
                outputs += [model(**toy_inputs(step, STEPS)) for step in range(5)]
                cachedit.limit_requests(model, max_bytes=1)
                outputs += [model(**toy_inputs(step, STEPS)) for step in range(5, 8)]
                other = records(model)
            cachedit.limit_requests(model)
            outputs += [model(**toy_inputs(step, STEPS)) for step in range(5, STEPS)]
            with pytest.raises(TypeError):
                model(None, None, None)
            outputs += run_toy(model, STEPS)
            second = records(model)
            cachedit.refresh_context(model, residual_diff_threshold=0.6, max_warmup_steps=1)
            outputs += run_toy(model, STEPS)
            third = records(model)
            cachedit.disable_cache(model)
            outputs += run_toy(model, 1)
        results.append((outputs, first, other, second, third))
    alike(results[1], results[0])
    assert graphs.replays > 4 * STEPS and max(read_back) == 3


REFUSED = {
    "Hermite weighs otherwise": ({}, cachedit.HermiteCalibratorConfig()),
    "branches share a difference": ({"cfg_diff_compute_separate": False}, None),
    "the mask has 1025 steps, beyond 1024": ({"steps_computation_mask": [1] * 1025, "num_inference_steps": 1025}, None),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_device_cannot_decide_the_host_does(
    backend: Composes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings, calibrator = REFUSED[reason]
    results = []
    for its in (None, backend):
        model = make_toy()
        graphs = enable(model, calibrator, its, **settings)
        results.append((run_toy(model, STEPS) + run_toy(model, STEPS), records(model)))
    alike(results[1], results[0])
    assert backend.pieces == 0 and graphs.replays > 0
    assert caplog.text.count(f"steps of Toy are decided on the host: {reason}") == 1


def test_a_loop_that_keeps_outputs_is_not_cut(backend: Composes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    results = []
    for its in (None, backend):
        torch.manual_seed(0)
        model = Shaped("kept", SingleBlock).eval().requires_grad_(False)
        adapter = cachedit.BlockAdapter(
            transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_3
        )
        cachedit.enable_cache(
            adapter, DBCacheConfig(**DYNAMIC | {"Fn_compute_blocks": 4, "num_inference_steps": STEPS})
        )
        controller = controller_of(model)
        if its is not None:
            controller.graphs = ForwardGraphs(controller, backend=its)
        results.append((run_toy(model, STEPS), records(model)))
    alike(results[1], results[0])
    assert backend.pieces == 0 and "its loop keeps what single blocks return" in caplog.text


def test_what_cannot_be_cut_is_decided_on_the_host(backend: Composes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def piece(run: Any, pool: Any) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    backend.piece = piece  # type: ignore[method-assign]
    results = []
    for its in (None, backend):
        model = make_toy()
        graphs = enable(model, TaylorSeerCalibratorConfig(), its)
        results.append((run_toy(model, STEPS) + run_toy(model, STEPS), records(model)))
    alike(results[1], results[0])
    assert backend.captures > 0 and graphs.eager["a step that has to be measured"] > 0
    assert caplog.text.count("steps of Toy are decided on the host, no graph can: operation not permitted") == 1


@pytest.fixture
def cuda_part() -> None:
    if reason := step_graphs.unavailable():
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("cuda_part")
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_on_a_gpu(calibrator: str, read_back: list[int]) -> None:
    """Two requests that take turns, three times over: the same pictures and records as without graphs."""
    results = []
    for captured in (False, True):
        model = make_toy().cuda()
        enable(model, CALIBRATORS[calibrator])
        if captured:
            cachedit.enable_cuda_graphs(model)
        outputs = []
        with torch.inference_mode():
            for step in range(3 * STEPS):
                for key in "ab":
                    inputs = toy_inputs(step % STEPS, STEPS, seed=ord(key))
                    with cachedit.request(model, key, STEPS):
                        outputs.append(model(**{name: value.cuda() for name, value in inputs.items()}))
        seen = []
        for key in "ab":
            with cachedit.request(model, key):
                seen.append(records(model))
        results.append((outputs, seen))
    torch.testing.assert_close(results[1][0], results[0][0])  # on a GPU the order of sums is free
    ours, eager = ([[(r.step, r.reused, r.reason) for r in entry[0][1]] for entry in result[1]] for result in results)
    assert ours == eager
    graphs = controller_of(model).graphs
    assert set(graphs.eager) == {"the first of its kind"} and graphs.replays > 5 * STEPS, str(graphs)
    assert len(read_back) == 6  # once per request


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("cuda_part")
@pytest.mark.parametrize("settings", [{}, STATIC], ids=["decided on the device", "static"])
def test_on_a_gpu_nothing_waits(settings: dict[str, Any]) -> None:
    """Up to a request's last step, once graphs are captured, torch is not seen to wait for the device."""
    model = make_toy().cuda()
    enable(model, TaylorSeerCalibratorConfig(), **settings)
    cachedit.enable_cuda_graphs(model)
    inputs = [{name: value.cuda() for name, value in toy_inputs(step, STEPS).items()} for step in range(STEPS)]
    with torch.inference_mode():
        for given in inputs:
            model(**given)
        for step, given in enumerate(inputs):
            torch.cuda.set_sync_debug_mode("error" if step < STEPS - 1 else "default")
            try:
                model(**given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert controller_of(model).graphs.replays == 2 * STEPS - 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_numbers_come_back_from_a_gpu() -> None:
    rows = torch.rand(3, 2, device="cuda")
    assert store.read_back(rows) == rows.cpu().tolist()
