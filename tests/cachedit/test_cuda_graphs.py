"""Captured forwards: with a backend that replays by running the captured function again, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch

import cachedit
from cachedit import DBCacheConfig, ForwardPattern, PolicyConfig, TaylorSeerCalibratorConfig
from cachedit.controller import controller_of
from cachedit.cuda_graphs import ForwardGraphs
from captures import Replays
from toys import Toy, flux_inputs, make_toy, run_toy, tiny_flux, toy_inputs

STEPS = 8
MASK = [1, 1, 1, 0, 0, 1, 0, 1]
EAGER = 2  # steps of a toy that run eagerly: its lists are learnt at the first, the second is the first of its kind
STATIC = {"steps_computation_mask": MASK, "steps_computation_policy": "static"}


class Fails(Replays):
    def capture(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Callable[[], None]]:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")


def enable(model: Any, calibrator: Any = None, graphs: Any = None, **settings: Any) -> ForwardGraphs | None:
    """The cache on a toy, with graphs from a backend if one is given."""
    common = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "num_inference_steps": STEPS}
    cachedit.enable_cache(model, DBCacheConfig(**(common | settings)), calibrator)
    controller = controller_of(model)
    controller.graphs = None if graphs is None else ForwardGraphs(controller, backend=graphs)
    return controller.graphs


def run(model: Any, requests: int = 3) -> list[torch.Tensor]:
    return [output for seed in range(requests) for output in run_toy(model, STEPS, seed=seed)]


def records(model: Any) -> list[Any]:
    return [branch.records for entry in cachedit.summary(model, logging=False) for branch in entry.branches.values()]


CALIBRATORS = {
    "plain": None,
    "order 2": TaylorSeerCalibratorConfig(taylorseer_order=2),
    "one stream": TaylorSeerCalibratorConfig(enable_encoder_calibrator=False),
    "outputs kept": TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states"),
    "outputs of one": TaylorSeerCalibratorConfig(
        calibrator_cache_type="hidden_states", enable_encoder_calibrator=False
    ),
}


@pytest.mark.parametrize("pattern", [ForwardPattern.Pattern_0, ForwardPattern.Pattern_2, ForwardPattern.Pattern_3])
@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("in_place", [False, True])
def test_replayed_forwards_equal_eager_ones(pattern: ForwardPattern, calibrator: str, in_place: bool) -> None:
    results = []
    for backend in (None, Replays()):
        model = make_toy(pattern=pattern, in_place=in_place)
        graphs = enable(model, CALIBRATORS[calibrator], backend, **STATIC)
        results.append((run(model), records(model)))
    (eager, eager_records), (replayed, replayed_records) = results
    torch.testing.assert_close(replayed, eager, rtol=0, atol=0)
    assert replayed_records == eager_records
    assert graphs.backend.captures == 2  # computed and reused
    assert graphs.replays == 3 * STEPS - EAGER and graphs.eager == {"the first of its kind": 1}


def test_a_whole_transformer_and_its_output_class() -> None:
    results = []
    for backend in (None, Replays()):
        model = tiny_flux()
        graphs = enable(model, TaylorSeerCalibratorConfig(), backend, **STATIC)
        with torch.inference_mode():
            results.append([model(**flux_inputs(step, STEPS)).sample for step in range(STEPS)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert graphs.replays == STEPS - 1


def test_steps_that_are_measured_run_eagerly_between_replayed_ones() -> None:
    settings = {"residual_diff_threshold": 0.5, "max_warmup_steps": 4, "max_continuous_cached_steps": 1}
    results = []
    for backend in (None, Replays()):
        model = make_toy()
        graphs = enable(model, TaylorSeerCalibratorConfig(), backend, **settings)
        results.append((run(model), records(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert results[1][1] == results[0][1]
    measured = sum(record.diff is not None for record in results[1][1][0])
    assert 0 < measured < STEPS and graphs.eager["a step that has to be measured"] == 3 * measured
    assert graphs.replays == 3 * (STEPS - measured) - EAGER


def test_outputs_are_the_callers_own() -> None:
    model = make_toy()
    enable(model, None, Replays(), **STATIC)
    outputs = run_toy(model, STEPS)
    copies = [output.clone() for output in outputs]
    run_toy(model, STEPS, seed=5)
    torch.testing.assert_close(outputs, copies, rtol=0, atol=0)


def test_shapes_take_turns_within_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    model, other = make_toy(), make_toy()
    enable(other, None, None, **STATIC)
    graphs = enable(model, None, Replays(), **STATIC)
    graphs.max_graphs = 1
    for tokens in (5, 7, 5, 7):
        torch.testing.assert_close(run_toy(model, STEPS, tokens=tokens), run_toy(other, STEPS, tokens=tokens))
    assert len(graphs.graphs) == 1 and graphs.evicted > 4
    assert caplog.text.count("CUDA graphs are dropped before they are used again: more than max_graphs=1") == 1


def test_guidance_branches_have_graphs_of_their_own() -> None:
    results = []
    for backend in (None, Replays()):
        model = make_toy()
        graphs = enable(model, TaylorSeerCalibratorConfig(), backend, enable_separate_cfg=True, **STATIC)
        with torch.no_grad():
            results.append([model(**toy_inputs(step, STEPS, seed=seed)) for step in range(STEPS) for seed in (1, 2)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert graphs.backend.captures == 4 and graphs.replays == 2 * (STEPS - 1) - 1


def test_force_refresh_and_requests_that_end_early() -> None:
    results = []
    for backend in (None, Replays()):
        model = make_toy()
        graphs = enable(model, TaylorSeerCalibratorConfig(), backend, force_refresh_step_hint=5, **STATIC)
        outputs = run_toy(model, STEPS)[:3]
        with torch.no_grad():
            outputs += [model(**toy_inputs(step, STEPS)) for step in range(3)]
        cachedit.refresh_context(model)
        results.append((outputs + run_toy(model, STEPS), records(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert results[1][1] == results[0][1]
    assert graphs.replays > STEPS


def test_another_configuration_is_captured_anew() -> None:
    results = []
    for backend in (None, Replays()):
        model = make_toy()
        graphs = enable(model, None, backend, **STATIC)
        outputs = run_toy(model, STEPS)
        cachedit.refresh_context(
            model, cache_config=DBCacheConfig(Fn_compute_blocks=3, num_inference_steps=STEPS, **STATIC)
        )
        assert graphs is None or not graphs.graphs
        results.append(outputs + run_toy(model, STEPS))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_other_weights_are_not_replayed() -> None:
    model = make_toy()
    graphs = enable(model, None, Replays(), **STATIC)
    run(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    run_toy(model, 1)
    assert graphs.eager["the first of its kind"] == 2


def test_what_cannot_be_captured_runs_eagerly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, other = make_toy(), make_toy()
    enable(other, TaylorSeerCalibratorConfig(), None, **STATIC)
    graphs = enable(model, TaylorSeerCalibratorConfig(), Fails(), **STATIC)
    torch.testing.assert_close(run(model), run(other), rtol=0, atol=0)
    assert records(model) == records(other)
    assert graphs.replays == 0 and graphs.eager["it cannot be captured"] == 3 * STEPS - EAGER
    assert caplog.text.count("a forward of Toy cannot be captured: operation not permitted") == 1


def hook_a_block(model: Any) -> None:
    model.blocks[3]._hf_hook = object()


class Taking(Toy):
    def forward(self, hidden_states, encoder_hidden_states, timestep, other=None):
        return super().forward(hidden_states, encoder_hidden_states, timestep)


REFUSED = {
    "CUDA graphs need a CUDA device, not cpu": lambda model: setattr(
        controller_of(model), "graphs", ForwardGraphs(controller_of(model))
    ),
    "the transformer is in training mode": lambda model: model.train(),
    "it cannot be captured": hook_a_block,
    "autocast is on": None,
    "an argument is object": None,
    "gradients are wanted": None,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_reasons(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Taking().eval().requires_grad_(False)
    enable(model, None, Replays(), **STATIC)
    if change := REFUSED[reason]:
        change(model)
    extra = {"other": object()} if reason == "an argument is object" else {}
    wanted = reason == "gradients are wanted"
    for step in range(4):
        inputs = toy_inputs(step, STEPS)
        inputs["hidden_states"].requires_grad_(wanted)
        with torch.set_grad_enabled(wanted), torch.autocast("cpu", enabled=reason == "autocast is on"):
            assert model(**inputs, **extra).isfinite().all()
    cachedit.summary(model)
    assert f": {reason}" in capsys.readouterr().out
    assert controller_of(model).graphs.replays == 0


class Always:
    def decide(self, step: cachedit.StepView) -> cachedit.Decision:
        return cachedit.Decision.REUSE


OTHERWISE = {
    "PolicyConfig decides otherwise": (PolicyConfig(Fn_compute_blocks=1, policy=Always), None),
    "DBPruneConfig decides otherwise": (cachedit.DBPruneConfig(Fn_compute_blocks=1), None),
    "DMD reads residuals back": (DBCacheConfig(Fn_compute_blocks=1), cachedit.DMDCalibratorConfig()),
    "blocks has nothing to reuse": (DBCacheConfig(Fn_compute_blocks=6), None),
}


@pytest.mark.parametrize("reason", OTHERWISE)
def test_configurations_that_are_not_captured(reason: str) -> None:
    model = make_toy()
    cachedit.enable_cache(model, *OTHERWISE[reason])
    controller = controller_of(model)
    controller.graphs = ForwardGraphs(controller, backend=Replays())
    run_toy(model, 3)
    assert controller.graphs.eager == {reason: 2}


def test_arguments() -> None:
    model = make_toy()
    with pytest.raises(ValueError, match="pipe_or_transformer: the cache is not enabled on this Toy"):
        cachedit.enable_cuda_graphs(model)
    enable(model)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="max_graphs must be an integer of at least 1"):
            cachedit.enable_cuda_graphs(model, max_graphs=wrong)
    model._cachedit_shards = 2
    with pytest.raises(ValueError, match="work is split among ranks"):
        cachedit.enable_cuda_graphs(model)
    assert controller_of(model).graphs is None
    del model._cachedit_shards
    assert cachedit.enable_cuda_graphs(model) is model
    assert controller_of(model).graphs is not None
    cachedit.disable_cache(model)
    assert run_toy(model, 1)[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_on_a_gpu(calibrator: str) -> None:
    results = []
    for captured in (False, True):
        model = make_toy().cuda()
        enable(model, CALIBRATORS[calibrator], None, **STATIC)
        if captured:
            cachedit.enable_cuda_graphs(model)
        with torch.inference_mode():
            results.append(
                [
                    model(**{name: value.cuda() for name, value in toy_inputs(step, STEPS, seed=seed).items()})
                    for seed in range(3)
                    for step in range(STEPS)
                ]
            )
    torch.testing.assert_close(*results)
    assert controller_of(model).graphs.replays == 3 * STEPS - EAGER
