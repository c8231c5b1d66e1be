"""What docs/differences.md says, each claim seen on both packages. What differs in numbers is in benchmarks."""

import logging
import math

import pytest
import torch

import cachedit
from pipelines import build
from toys import call_flux, make_toy, run_toy, tiny_flux_pipeline, toy_inputs

cache_dit = pytest.importorskip("cache_dit")

PACKAGES = [cachedit, cache_dit]
OURS, THEIRS = 0, 1


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)  # cache_dit reports each case at length
    yield
    logging.disable(logging.NOTSET)


def both(function):
    """What ``function(package)`` gives for ours and for theirs."""
    return [function(package) for package in PACKAGES]


def settings(package, **fields):
    defaults = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.5}
    return package.DBCacheConfig(**(defaults | fields))


def enable(package, model, calibrator=None, **fields):
    """Enable on a toy, by itself."""
    adapter = package.BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        forward_pattern=getattr(package.ForwardPattern, model.pattern.name),
    )
    package.enable_cache(adapter, cache_config=settings(package, **fields), calibrator_config=calibrator)
    return model


def own_class(pipe):
    """Give a pipeline a class of its own, since cache_dit patches it; the name stays, since it looks that up."""
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    return pipe


def watch(*lists):
    """A list that gets, for each forward, the numbers of the blocks that ran; blocks are numbered through all lists."""
    calls = []

    def hook(number):
        def note(module, args):
            if number == 0:
                calls.append([])
            calls[-1].append(number)

        return note

    for number, block in enumerate(block for blocks in lists for block in blocks):
        block.register_forward_pre_hook(hook(number))
    return calls


def mask_of(calls, blocks):
    return "".join("1" if len(call) == blocks else "0" for call in calls)


def test_a_new_request_is_noticed_when_it_starts():
    def second_request(package):
        model = enable(package, make_toy(depth=6), num_inference_steps=6, residual_diff_threshold=0.99)
        calls = watch(model.blocks)
        run_toy(model, 6)
        run_toy(model, 6, seed=9)
        return mask_of(calls[6:], 6)

    assert both(second_request) == ["110000", "011000"]  # theirs begins with the residual of the request before


def test_first_derivatives():
    def forecast(package, calibrator):
        model = enable(package, make_toy(depth=6), calibrator, num_inference_steps=6, residual_diff_threshold=0.99)
        return run_toy(model, 3)[2]

    plain = both(lambda package: forecast(package, None))
    taylor = both(lambda package: forecast(package, package.TaylorSeerCalibratorConfig(taylorseer_order=1)))
    assert torch.equal(*plain) and torch.equal(taylor[THEIRS], plain[THEIRS])  # no derivative there yet
    assert not torch.allclose(taylor[OURS], plain[OURS], rtol=1e-3)


def test_dmd_falls_back_to_a_straight_line():
    from cache_dit.caching.cache_contexts.calibrators.dmd import DMDState

    from cachedit.dmd import DMD

    start, slope = torch.tensor([5.0, -1.0]), torch.tensor([0.5, 2.0])
    state = DMDState()
    for step in range(3):
        state.mark_step_begin()
        state.update(start + step * slope)
    state.mark_step_begin()
    torch.testing.assert_close(state.approximate(), start + 2 * slope + 2 * slope)  # twice the slope
    weights = DMD(history=6).weights([2, 1, 0], 3)
    forecast = sum(weight * (start + step * slope) for weight, step in zip(weights, [2, 1, 0], strict=False))
    torch.testing.assert_close(forecast, start + 3 * slope)


def test_accumulated_difference_recovers():
    def decisions(package):
        model = enable(package, make_toy(depth=6), num_inference_steps=16, max_accumulated_residual_diff_threshold=0.12)
        calls = watch(model.blocks)
        run_toy(model, 16)
        return mask_of(calls, 6)

    ours, theirs = both(decisions)
    assert "0" in theirs and set(theirs[theirs.rindex("0") + 1 :]) == {"1"}  # once reached, never again
    assert ours.count("0") > theirs.count("0") and "0" in ours[-3:]


def test_thresholds_of_one_and_above_are_compared_with():
    def decisions(package):
        model = enable(package, make_toy(depth=6), num_inference_steps=6, residual_diff_threshold=1.0)
        calls = watch(model.blocks)
        with torch.no_grad():
            for step in range(6):
                inputs = toy_inputs(step, 6)
                inputs["hidden_states"] *= 1 if step < 4 else -30
                model(**inputs)
        return mask_of(calls, 6), max(package.summary(model, logging=False)[0].residual_diffs.values())

    (ours, diff), (theirs, theirs_diff) = both(decisions)
    assert ours == "110010" and diff > 1.0
    assert theirs == "110000" and theirs_diff == -1.0  # not measured


class TestMasks:
    MASK = (1, 1, 0, 0, 1, 0)

    def test_shorter_than_the_request(self):
        def decisions(package):
            model = enable(
                package,
                make_toy(depth=6),
                steps_computation_mask=list(self.MASK),
                steps_computation_policy="static",
            )
            calls = watch(model.blocks)
            run_toy(model, 9)
            return mask_of(calls, 6)

        assert both(decisions) == ["110010111", "110010000"]

    def test_shorter_than_the_known_step_count(self):
        fields = {"steps_computation_mask": list(self.MASK), "num_inference_steps": 9}
        with pytest.raises(ValueError, match=r"steps_computation_mask.*expected 9.*got 6"):
            enable(cachedit, make_toy(depth=6), **fields)
        enable(cache_dit, make_toy(depth=6), **fields)

    def test_image_to_image(self):
        """Half of 20 steps are left to denoise."""

        def decisions(package, mask):
            tiny = build("FluxImg2ImgPipeline")
            config = settings(
                package, max_warmup_steps=0, steps_computation_mask=mask, steps_computation_policy="static"
            )
            config.enable_separate_cfg = False  # no negative prompt is given
            package.enable_cache(own_class(tiny.pipe), cache_config=config)
            transformer = tiny.pipe.transformer
            calls = watch(transformer.transformer_blocks, transformer.single_transformer_blocks)
            tiny(20, guided=False, strength=0.5)
            return mask_of(calls, 6)

        whole = cachedit.steps_mask(total_steps=20, mask_policy="fast")
        assert whole == cache_dit.steps_mask(total_steps=20, mask_policy="fast")
        assert decisions(cache_dit, whole) == "".join(map(str, whole[:10]))
        with pytest.raises(ValueError, match=r"steps_computation_mask.*expected 10.*got 20"):
            decisions(cachedit, whole)
        expected = cachedit.steps_mask(total_steps=10, mask_policy="fast")
        assert decisions(cachedit, "fast") == "".join(map(str, expected)) != "".join(map(str, whole[:10]))

    def test_that_begins_with_reuse(self):
        fields = {"steps_computation_mask": [0, 1, 0, 1], "steps_computation_policy": "static"}
        model = enable(cachedit, make_toy(depth=6), **fields)
        calls = watch(model.blocks)
        run_toy(model, 4)
        assert mask_of(calls, 6) == "1101"
        with pytest.raises(AssertionError, match="must be set before"):
            run_toy(enable(cache_dit, make_toy(depth=6), **fields), 4)


class TestBlocksThatWorkInPlace:
    MASK = (1, 1, 0, 1, 0, 1)

    def run(self, package, in_place, **fields):
        model = enable(package, make_toy(depth=6, in_place=in_place), num_inference_steps=6, **fields)
        calls = watch(model.blocks)
        return run_toy(model, 6), mask_of(calls, 6)

    def test_they_are_measured(self):
        assert [self.run(package, in_place=True)[1] for package in PACKAGES] == ["110000", "111111"]
        assert [self.run(package, in_place=False)[1] for package in PACKAGES] == ["110000", "110000"]

    def test_they_are_reused(self):
        fields = {"steps_computation_mask": list(self.MASK), "steps_computation_policy": "static"}
        expected, _ = self.run(cachedit, in_place=False, **fields)
        ours, theirs = (self.run(package, in_place=True, **fields)[0] for package in PACKAGES)
        for step, bit in enumerate(self.MASK):
            torch.testing.assert_close(ours[step], expected[step])
            if not bit:  # theirs adds a residual of zero
                assert (theirs[step] - expected[step]).abs().mean() > 0.3


def test_lists_of_one_transformer_share_a_decision():
    def forwards(package):
        pipe = own_class(tiny_flux_pipeline())
        transformer = pipe.transformer
        lists = [transformer.transformer_blocks, transformer.single_transformer_blocks]
        calls = watch(*lists)
        adapter = package.BlockAdapter(
            pipe=pipe, transformer=transformer, blocks=lists, forward_pattern=[package.ForwardPattern.Pattern_1] * 2
        )
        package.enable_cache(adapter, cache_config=settings(package))
        call_flux(pipe, 8)
        return calls

    ours, theirs = both(forwards)
    assert ours == [list(range(6))] * 2 + [[0]] * 6
    assert theirs[:3] == [*[list(range(6))] * 2, [0, 3]]  # block 3, the head of the second list, runs as well
    assert [0, 3, 4, 5] in theirs  # and now and then that list computes while the first one reuses


def test_more_computed_blocks_than_there_are():
    fields = {"Fn_compute_blocks": 4, "Bn_compute_blocks": 4}
    with pytest.raises(ValueError, match="more than the 6 blocks"):
        enable(cachedit, make_toy(depth=6), **fields)
    model = enable(cache_dit, make_toy(depth=6), **fields)
    calls = watch(model.blocks)
    run_toy(model, 1)
    assert calls == [[0, 1, 2, 3, 2, 3, 4, 5]]  # two of them twice


class TestObjects:
    def test_other_pipelines_of_the_class_are_left_alone(self):
        def cached_steps(package):
            cached = own_class(tiny_flux_pipeline())
            other = tiny_flux_pipeline(seed=1)
            other.__class__ = type(cached)
            package.enable_cache(cached, cache_config=settings(package, residual_diff_threshold=0.9))
            call_flux(cached, 6)
            before = package.summary(cached, logging=False)[0].cached_steps
            call_flux(other, 6)
            return before, package.summary(cached, logging=False)[0].cached_steps

        ours, theirs = both(cached_steps)
        assert ours == ([2, 3, 4, 5], [2, 3, 4, 5])
        assert theirs == ([2, 3, 4, 5], [])  # calling the other one has started a request on this one

    def test_disabling_restores_the_forward(self):
        def restored(package):
            pipe = own_class(tiny_flux_pipeline())
            package.enable_cache(pipe, cache_config=settings(package))
            package.disable_cache(pipe)
            transformer = pipe.transformer
            return "forward" in vars(transformer), transformer.forward.__func__ is type(transformer).forward

        assert both(restored) == [(False, True), (True, False)]

    def test_enabling_again_reconfigures(self):
        def decisions(package):
            model = make_toy(depth=6)
            calls = watch(model.blocks)
            for mask in ([1, 0, 0, 0], [1, 1, 1, 0]):
                enable(package, model, steps_computation_mask=mask, steps_computation_policy="static")
            run_toy(model, 4)
            return mask_of(calls, 6)

        assert both(decisions) == ["1110", "1000"]

    def test_the_configuration_stays_the_users(self):
        def changed(package):
            pipe = own_class(build("QwenImagePipeline").pipe)
            config = settings(package)
            package.enable_cache(pipe, cache_config=config)
            return config.enable_separate_cfg

        assert both(changed) == [None, True]


def test_non_finite_differences_compute_and_are_counted():
    def decisions(package):
        model = enable(package, make_toy(depth=6), num_inference_steps=9)
        calls = watch(model.blocks)
        with torch.no_grad():
            for step in range(8):
                inputs = toy_inputs(step, 9)
                if step == 4:
                    inputs["hidden_states"][0, 0, 0] = math.nan
                model(**inputs)
        return mask_of(calls, 6), package.summary(model, logging=False)[0]

    (ours, stats), (theirs, _) = both(decisions)
    assert ours == theirs == "11001100"  # the step, and the one that is measured against it
    assert stats.main.nonfinite_diffs == 2


def test_summary():
    def entries(package):
        pipe = own_class(tiny_flux_pipeline())
        transformer = pipe.transformer
        before = package.summary(pipe, logging=False)
        adapter = package.BlockAdapter(
            pipe=pipe,
            transformer=transformer,
            blocks=[transformer.transformer_blocks, transformer.single_transformer_blocks],
            forward_pattern=[package.ForwardPattern.Pattern_1] * 2,
        )
        package.enable_cache(adapter, cache_config=settings(package))
        call_flux(pipe, 6)
        return len(before), len(package.summary(pipe, logging=False))

    # Theirs: an empty entry where nothing is cached; one per list and one for the transformer.
    assert both(entries) == [(0, 1), (1, 3)]
