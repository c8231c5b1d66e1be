import math

import pytest
import torch

import cachedit
import cachedit_kernels
from cachedit import BlockAdapter, DBPruneConfig, ForwardPattern, TaylorSeerCalibratorConfig
from cachedit.forecast import taylor_weights
from toys import Toy, make_toy, run_toy, toy_inputs

STEPS = 12


def enable(model, calibrator=None, **settings):
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.06} | settings
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    return cachedit.enable_cache(adapter, DBPruneConfig(**settings), calibrator)


def records(model):
    (stats,) = cachedit.summary(model, logging=False)
    return stats.branches["default"].records


def reference(model, total, threshold, exempt, warmup=2, order=0, dynamic=None, last=-1):
    """DBPrune written down for the toy's own loop: returns outputs, and per step the blocks that were pruned."""
    inputs_of, residuals = {}, {}
    outputs, pruned = [], []
    for step in range(total):
        given = toy_inputs(step, total)
        hidden, encoder = model.project(given["hidden_states"]), given["encoder_hidden_states"]
        temb = torch.sin(given["timestep"].reshape(-1, 1, 1))
        diffs, skipped = [], []
        for number, block in enumerate(model.blocks):
            before = [hidden] if model.pattern.Return_H_Only else [hidden, encoder]
            prune = False
            if number not in exempt and step >= warmup:
                kept = inputs_of[number]
                diff = ((hidden - kept).abs().sum() / kept.abs().sum()).item()
                limit = threshold
                leading = [d for d in diffs[:5] if d > 0]
                if dynamic and leading:
                    relaxed = sum(leading) / len(leading) * dynamic
                    limit = relaxed if threshold < relaxed < 2 * threshold else threshold
                diffs.append(diff)
                prune = diff < limit
            if prune:
                history = residuals[number][: order + 1]
                weights = taylor_weights([at for at, _ in history], step, order)
                after = [
                    x + sum(w * r[i] for w, (_, r) in zip(weights, history, strict=True)) for i, x in enumerate(before)
                ]
                skipped.append(number)
            else:
                streams = {"hidden_states": hidden, "encoder_hidden_states": encoder}
                out = block(**{name: streams[name] for name in model.pattern.In}, temb=temb)
                after = (
                    [out] if model.pattern.Return_H_Only else list(out if model.pattern.Return_H_First else out[::-1])
                )
                inputs_of[number] = hidden
                change = [a - b for a, b in zip(after, before, strict=True)]
                residuals[number] = [(step, change), *residuals.get(number, [])]
            hidden, encoder = after[0], after[1] if len(after) == 2 else encoder
        outputs.append(hidden + encoder.mean(1, keepdim=True))
        pruned.append(len(skipped))
    return outputs, pruned


@pytest.mark.parametrize("threshold", [0.05, 0.07])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("pattern", list(ForwardPattern), ids=lambda p: p.name)
@torch.no_grad()
def test_every_pattern_decides_and_computes_as_written_down(pattern, order, threshold):
    model = make_toy(pattern=pattern)
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    expected, pruned = reference(model, STEPS, threshold, {0, 5}, order=order)
    assert 4 in pruned
    if (threshold == 0.07) != pattern.Forward_H_only and order > 0:
        assert set(pruned) & {1, 2, 3}  # here some steps are pruned in part
    enable(model, calibrator, Bn_compute_blocks=1, residual_diff_threshold=threshold)
    got = run_toy(model, STEPS)
    assert [record.pruned for record in records(model)] == pruned
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dynamic_threshold_and_exempt_blocks():
    model = make_toy()
    plain = reference(model, STEPS, 0.05, {0, 2})
    expected, pruned = reference(model, STEPS, 0.05, {0, 2}, dynamic=1.25)
    assert pruned != plain[1]
    enable(model, residual_diff_threshold=0.05, enable_dynamic_prune_threshold=True, non_prune_block_ids=[2, 99])
    got = run_toy(model, STEPS)
    assert [record.pruned for record in records(model)] == pruned
    torch.testing.assert_close(got[-1], expected[-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_dynamic_threshold_has_a_maximum():
    model = make_toy()
    settings = {"residual_diff_threshold": 0.05, "enable_dynamic_prune_threshold": True}
    enable(model, **settings)
    run_toy(model, STEPS)
    relaxed = sum(record.pruned for record in records(model))
    enable(model, **settings, max_dynamic_prune_threshold=0.05)
    run_toy(model, STEPS)
    capped = sum(record.pruned for record in records(model))
    assert [record.pruned for record in records(model)] == reference(model, STEPS, 0.05, {0})[1]
    assert capped < relaxed


@pytest.mark.parametrize("pattern", list(ForwardPattern), ids=lambda p: p.name)
def test_nothing_to_prune_is_the_baseline(pattern):
    model = make_toy(pattern=pattern)
    baseline = run_toy(model, 6)
    enable(model, residual_diff_threshold=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(run_toy(model, 6), baseline, strict=True))
    cachedit.disable_cache(model)
    assert all(torch.equal(a, b) for a, b in zip(run_toy(model, 6), baseline, strict=True))


@pytest.mark.parametrize("pattern", [ForwardPattern.Pattern_0, ForwardPattern.Pattern_3, ForwardPattern.Pattern_4])
def test_blocks_that_work_in_place(pattern):
    plain, in_place = make_toy(pattern=pattern), make_toy(pattern=pattern, in_place=True)
    results = []
    for model in (plain, in_place):
        enable(model, TaylorSeerCalibratorConfig())
        results.append(run_toy(model, STEPS))
        assert sum(record.pruned for record in records(model)) > 4
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert in_place._cachedit_controller.sections[0].in_place is True


def test_masks_and_limits_hold_for_all_blocks_of_a_step():
    model = make_toy()
    enable(model, residual_diff_threshold=1e9, max_continuous_cached_steps=1)
    run_toy(model, 8)
    assert [record.pruned for record in records(model)] == [0, 0, 5, 0, 5, 0, 5, 0]
    enable(model, residual_diff_threshold=1e9, max_cached_steps=2)
    run_toy(model, 8)
    assert [record.pruned for record in records(model)] == [0, 0, 5, 5, 0, 0, 0, 0]
    mask = [1, 1, 0, 1, 0, 0, 1, 1]
    enable(model, steps_computation_mask=mask, steps_computation_policy="static")
    run_toy(model, 8)
    assert [record.pruned for record in records(model)] == [5 * (1 - bit) for bit in mask]
    assert all(record.diff is None for record in records(model))  # nothing is measured


@pytest.fixture
def waits(monkeypatch):
    """Sizes of the results of ``l1`` that were read back."""
    calls = []
    original = torch.Tensor.tolist

    def tolist(tensor):
        calls.append(tensor.shape)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return calls


def test_blocks_that_were_pruned_together_are_decided_together(waits):
    model = make_toy()
    enable(model, residual_diff_threshold=1e9)
    counts = []
    with torch.no_grad():
        for step in range(5):
            model(**toy_inputs(step, STEPS))
            counts.append(len(waits))
            waits.clear()
    assert counts == [0, 0, 5, 1, 1]  # at most one per block, and one per step once it is known which go together


class Controlled(Toy):
    """Adds to hidden_states between blocks, as ControlNet does."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        hidden, encoder = self.project(hidden_states), encoder_hidden_states
        for number, block in enumerate(self.blocks):
            hidden, encoder = block(hidden, encoder, None)
            if number % 2:
                hidden = hidden + 0.01 * timestep.reshape(-1, 1, 1)
        return hidden


def test_a_loop_that_changes_the_streams_between_blocks(waits):
    """What was decided together is void then: every block is measured on, and adds to, what it really gets."""
    torch.manual_seed(0)
    model = Controlled().eval().requires_grad_(False)
    results, counts = [], []
    for together in (True, False):
        enable(model, residual_diff_threshold=1e9)
        waits.clear()
        with torch.no_grad():
            for step in range(5):
                results.append(model(**toy_inputs(step, STEPS)))
                if not together:
                    model._cachedit_controller.branches["default"].states[0].runs.clear()
        assert [record.pruned for record in records(model)] == [0, 0, 5, 5, 5]
        counts.append(len(waits))
    assert counts == [5 + 3 + 3, 5 + 5 + 5]  # together: block 1, blocks 2 and 3, blocks 4 and 5
    assert all(torch.equal(a, b) for a, b in zip(results[:5], results[5:], strict=True))


def test_a_static_mask_never_waits(waits):
    model = make_toy()
    enable(model, steps_computation_mask=[1, 1, 0, 0, 1, 0], steps_computation_policy="static")
    run_toy(model, 6)
    assert waits == []


def test_nan_computes_and_is_counted():
    model = make_toy()
    enable(model)
    with torch.no_grad():
        for step in range(6):
            inputs = toy_inputs(step, STEPS)
            if step == 3:
                inputs["hidden_states"][0, 0, 0] = math.nan
            model(**inputs)
    (stats,) = cachedit.summary(model, logging=False)
    assert [record.pruned for record in stats.branches["default"].records][3:5] == [0, 0]
    assert stats.main.nonfinite_diffs == 10  # the inputs kept at step 3 are compared with at step 4


def test_reduced_memory_keeps_a_quarter_of_the_inputs():
    def held(**settings):
        model = make_toy()
        enable(model, TaylorSeerCalibratorConfig(), residual_diff_threshold=1e9, **settings)
        run_toy(model, 4, tokens=8)
        assert [record.pruned for record in records(model)] == [0, 0, 5, 5]
        return cachedit.summary(model, logging=False)[0].bytes_held

    stream = 2 * 8 * 8 * 4  # batch, tokens, channels, bytes
    assert held() - held(force_reduce_calibrator_vram=True) == 5 * stream * 3 // 4


def test_an_exception_in_a_block_starts_afresh():
    model = make_toy()
    enable(model, residual_diff_threshold=1e9, non_prune_block_ids=[5])
    run_toy(model, 3)
    handle = model.blocks[5].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with torch.no_grad(), pytest.raises(ValueError, match="broken"):
        model(**toy_inputs(3, 8))
    handle.remove()
    with torch.no_grad():
        model(**toy_inputs(3, 8))
    assert [(record.step, record.pruned) for record in records(model)] == [(0, 0)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"non_prune_block_ids": [1, -2]}, r"non_prune_block_ids\[1\] must be at least 0, got -2"),
        ({"non_prune_block_ids": "12"}, "non_prune_block_ids must be a list of block numbers, got '12'"),
        ({"dynamic_prune_threshold_relax_ratio": math.nan}, "dynamic_prune_threshold_relax_ratio must be a number"),
        ({"max_dynamic_prune_threshold": "high"}, "max_dynamic_prune_threshold must be a number, got 'high'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        enable(make_toy(), **settings)


def test_a_pruned_block_costs_two_operators(monkeypatch):
    calls = []
    for name in ("l1", "residual_forecast", "residual_push", "residual_l1"):
        original = getattr(cachedit_kernels, name)
        monkeypatch.setattr(
            cachedit_kernels, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    model = make_toy()
    enable(model, residual_diff_threshold=1e9)
    run_toy(model, 2)
    assert calls == ["residual_push"] * 10
    calls.clear()
    with torch.no_grad():
        model(**toy_inputs(2, STEPS))
    assert sorted(calls) == ["l1"] * 5 + ["residual_forecast"] * 5
