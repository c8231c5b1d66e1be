"""What a loop over the blocks sees, for every pattern and every way of looping."""

import copy
import threading

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
from toys import HookExecutor, make_toy, run_toy, toy_inputs

PATTERNS = list(ForwardPattern)
STEPS = 10
MASK = [1, 1, 0, 1, 0, 0, 1, 0, 0, 0]


def enable(model, order=0, mask=MASK, **config):
    settings = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 1,
        "num_inference_steps": len(mask),
        "steps_computation_mask": mask,
        "steps_computation_policy": "static",
        **config,
    }
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cachedit.enable_cache(adapter, DBCacheConfig(**settings), calibrator)
    return model


def forwards(model, steps=STEPS):
    return [lambda step=step: model(**toy_inputs(step, steps)) for step in range(steps)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("keyword", [True, False], ids=["keyword", "positional"])
@pytest.mark.parametrize(("Fn", "Bn", "order"), [(1, 0, 0), (1, 0, 1), (2, 2, 2), (1, 4, 3), (3, 0, 1)])
def test_equals_an_independent_executor(pattern, keyword, Fn, Bn, order):
    model = make_toy(pattern=pattern, keyword=keyword)
    with torch.no_grad():
        expected = HookExecutor([(model.blocks, pattern)], Fn, Bn, order).run(forwards(model), MASK)
        enable(model, order, Fn_compute_blocks=Fn, Bn_compute_blocks=Bn)
        actual = [forward() for forward in forwards(model)]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert cachedit.summary(model, logging=False)[0].cached_steps == [i for i, bit in enumerate(MASK) if not bit]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("Fn", [2, 6], ids=["threshold 0", "every block in the head"])
def test_nothing_reusable_is_the_baseline_bit_for_bit(pattern, Fn):
    model = make_toy(pattern=pattern)
    baseline = run_toy(model, STEPS)
    enable(model, steps_computation_mask=None, residual_diff_threshold=0.0, Fn_compute_blocks=Fn)
    assert all(map(torch.equal, run_toy(model, STEPS), baseline))
    assert cachedit.summary(model, logging=False)[0].computed_steps == list(range(STEPS))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("loop", ["enumerate", "zip", "list"])
def test_other_loops_give_what_plain_iteration_gives(pattern, in_place, loop):
    plain, other = make_toy(pattern=pattern), make_toy(pattern=pattern, loop=loop, in_place=in_place)
    for model in (plain, other):
        enable(model, order=1, Bn_compute_blocks=1)
    for ours, theirs in zip(run_toy(other, STEPS), run_toy(plain, STEPS), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert cachedit.summary(other, logging=False)[0].cached_steps


@pytest.mark.parametrize("inference_mode", [False, True])
def test_blocks_that_work_in_place_are_noticed_on_the_first_step(inference_mode):
    model = make_toy(in_place=True)
    enable(model)
    with torch.inference_mode(inference_mode), torch.no_grad():
        model(**toy_inputs(0, STEPS))
    controller = model._cachedit_controller
    assert controller.sections[0].in_place is True
    assert controller.branches["default"].states[0].residuals.steps == [0]  # and that step is not lost

    model = make_toy()
    enable(model)
    run_toy(model, 1)
    assert model._cachedit_controller.sections[0].in_place is False


@pytest.mark.parametrize("loop", ["slice", "index", "halves"])
def test_loops_past_the_interception_run_uncached(loop):
    model = make_toy(loop=loop)
    baseline = run_toy(model, STEPS)
    enable(model)
    assert all(map(torch.equal, run_toy(model, STEPS), baseline))
    assert cachedit.summary(model, logging=False)[0].cached_steps == []


def test_list_is_the_plain_list_outside_of_a_forward():
    model = make_toy()
    blocks, names = list(model.blocks), list(model.state_dict())
    text = repr(model)
    enable(model)
    cached = model.blocks
    assert isinstance(cached, nn.ModuleList)
    assert list(cached) == blocks and [b for _, b in enumerate(cached)] == blocks
    assert [a for a, _ in zip(cached, range(6), strict=True)] == blocks
    assert list(reversed(cached)) == blocks[::-1]
    assert cached[0] is blocks[0] and cached[-1] is blocks[-1] and len(cached) == 6
    assert blocks[2] in cached
    for part in (cached[1:4], cached[::-1], cached[:]):
        assert type(part) is nn.ModuleList
    assert list(cached[1:4]) == blocks[1:4]
    assert list(model.state_dict()) == names and repr(model) == text
    cachedit.disable_cache(model)
    assert type(model.blocks) is nn.ModuleList and "_cachedit_links" not in vars(model.blocks)


def test_subclasses_of_module_list_keep_their_class_and_slices():
    class Blocks(nn.ModuleList):
        def extra(self):
            return len(self)

    model = make_toy()
    model.blocks = Blocks(model.blocks)
    enable(model)
    assert isinstance(model.blocks, Blocks) and model.blocks.extra() == 6
    assert type(model.blocks[:2]) is Blocks
    cachedit.disable_cache(model)
    assert type(model.blocks) is Blocks


def test_sites_show_their_block_s_attributes():
    class Reads(type(make_toy())):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            for block in self.blocks:
                assert block.mix.in_features == 8
                hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states)
            return hidden_states

    model = Reads().eval().requires_grad_(False)
    enable(model)
    run_toy(model, STEPS)
    assert cachedit.summary(model, logging=False)[0].cached_steps


@pytest.mark.parametrize("in_place_add", [False, True])
def test_residuals_added_between_blocks_count_once(in_place_add):
    """ControlNet's way: the loop adds something after each block; a reused step must set, not add."""

    class Controlled(type(make_toy())):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            for i, block in enumerate(self.blocks):
                hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states)
                if in_place_add:
                    hidden_states += 0.1 * (i + 1)
                else:
                    hidden_states = hidden_states + 0.1 * (i + 1)
            return hidden_states

    torch.manual_seed(0)
    model = Controlled().eval().requires_grad_(False)
    inputs = toy_inputs(0, 1)
    mask = [1, 0, 0]
    with torch.no_grad():
        baseline = model(**inputs)
        enable(model, mask=mask, Bn_compute_blocks=1)
        outputs = [model(**inputs) for _ in mask]
    for output in outputs:  # the same input at each step: reuse is exact
        torch.testing.assert_close(output, baseline, rtol=1e-5, atol=1e-5)


def test_exception_inside_a_block_leaves_the_model_usable():
    model = make_toy()
    baseline = run_toy(model, STEPS)
    enable(model, steps_computation_mask=None, max_warmup_steps=0, residual_diff_threshold=10.0)
    expected = run_toy(model, STEPS)
    armed = [True]

    def fail(module, args):
        if armed[0]:
            raise RuntimeError("boom")

    cachedit.refresh_context(model)
    handle = model.blocks[3].register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="boom"):
        model(**toy_inputs(0, STEPS))
    armed[0] = False
    assert next(iter(model.blocks)) is model.blocks[0]  # not left inside of a forward
    handle.remove()
    assert all(map(torch.equal, run_toy(model, STEPS), expected))
    cachedit.disable_cache(model)
    assert all(map(torch.equal, run_toy(model, STEPS), baseline))


def test_threads_on_their_own_models_do_not_meet():
    models = [make_toy(seed=i, pattern=PATTERNS[i]) for i in range(4)]
    for model in models:
        enable(model, order=1)
    expected = [run_toy(model, STEPS) for model in models]
    results = [None] * 4

    def work(i):
        for _ in range(5):
            results[i] = run_toy(models[i], STEPS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(results, expected, strict=True):
        assert all(map(torch.equal, actual, wanted))


def test_nested_forwards_keep_their_runs_apart():
    inner = make_toy(seed=3)

    class Outer(type(inner)):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            for i, block in enumerate(self.blocks):
                hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states)
                if i == 2:
                    encoder_hidden_states = (
                        encoder_hidden_states + self.other[0](hidden_states, encoder_hidden_states, timestep).mean()
                    )
            return hidden_states

    torch.manual_seed(0)
    outer = Outer().eval().requires_grad_(False)
    outer.other = [inner]
    baseline = run_toy(outer, 3)
    enable(outer, steps_computation_mask=None, residual_diff_threshold=0.0)
    enable(inner, steps_computation_mask=None, residual_diff_threshold=0.0)
    assert all(map(torch.equal, run_toy(outer, 3), baseline))
    for model in (outer, inner):
        assert cachedit.summary(model, logging=False)[0].computed_steps == [0, 1, 2]


def test_one_list_in_two_transformers():
    first, second = make_toy(seed=0), make_toy(seed=1)
    second.blocks = first.blocks
    apart = [run_toy(enable(copy.deepcopy(model)), STEPS) for model in (first, second)]
    for model in (first, second):
        enable(model)
    assert all(map(torch.equal, run_toy(first, STEPS), apart[0]))
    assert all(map(torch.equal, run_toy(second, STEPS), apart[1]))
    cachedit.disable_cache(first)
    assert all(map(torch.equal, run_toy(second, STEPS), apart[1]))
    cachedit.disable_cache(second)
    assert type(first.blocks) is nn.ModuleList


def test_deepcopy_of_a_cached_model_has_a_cache_of_its_own():
    model = make_toy()
    enable(model, order=1)
    expected = run_toy(model, STEPS)
    other = copy.deepcopy(model)
    assert other._cachedit_controller.transformer is other
    assert all(map(torch.equal, run_toy(other, STEPS), expected))
    with torch.no_grad():
        other.project.weight.mul_(0.0)
    assert not torch.equal(run_toy(other, STEPS)[0], expected[0])
    assert all(map(torch.equal, run_toy(model, STEPS), expected))
    cachedit.disable_cache(other)
    assert type(other.blocks) is nn.ModuleList
    assert model._cachedit_controller.attached
