"""What a cached model stands in real use: other configurations, bad numbers, exceptions, copies, being taken apart."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, DBPruneConfig, ForwardPattern, TaylorSeerCalibratorConfig
from cachedit.controller import controller_of
from holds import both_kinds, enable, reused, reusing, same, static, traces, zeros
from toys import DIM, call_flux, flux_inputs, make_toy, run_flux, run_toy, tiny_flux, tiny_flux_pipeline, toy_inputs

CONFIGS = {
    "DBCache": reusing(),
    "DBCache, other": reusing(max_warmup_steps=4, Bn_compute_blocks=1),
    "DBPrune": reusing(DBPruneConfig),
    "static": static([1, 0, 1, 0, 0, 1]),
}


@pytest.fixture(scope="module")
def expected():
    """What a pipeline gives under each configuration."""
    outputs = {}
    for name, config in CONFIGS.items():
        pipe = tiny_flux_pipeline()
        cachedit.enable_cache(pipe, config)
        outputs[name] = call_flux(pipe, 6)
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == len(CONFIGS)
    return outputs


class TestConfigurations:
    def test_pipelines_of_one_class_at_once(self, expected):
        pipes = {name: tiny_flux_pipeline() for name in CONFIGS}
        for name, pipe in pipes.items():
            cachedit.enable_cache(pipe, CONFIGS[name])
        for _ in range(2):
            for name, pipe in pipes.items():
                assert torch.equal(call_flux(pipe, 6), expected[name])

    @pytest.mark.parametrize("first", CONFIGS)
    @pytest.mark.parametrize("second", CONFIGS)
    def test_enabling_again_reconfigures(self, first, second, expected):
        pipe = tiny_flux_pipeline()
        baseline, before = call_flux(pipe, 6), traces(pipe.transformer)
        cachedit.enable_cache(pipe, CONFIGS[first], TaylorSeerCalibratorConfig())
        call_flux(pipe, 6)
        cachedit.enable_cache(pipe, CONFIGS[second])
        assert torch.equal(call_flux(pipe, 6), expected[second])
        cachedit.disable_cache(pipe)
        assert traces(pipe.transformer) == before and torch.equal(call_flux(pipe, 6), baseline)

    @pytest.mark.parametrize("second", CONFIGS)
    def test_a_refresh_may_bring_another_kind(self, second, expected):
        pipe = tiny_flux_pipeline()
        cachedit.enable_cache(pipe, CONFIGS["DBCache"])
        call_flux(pipe, 6)
        cachedit.refresh_context(pipe, CONFIGS[second])
        if second != "static":  # a mask that was set stays, unless it is replaced
            assert torch.equal(call_flux(pipe, 6), expected[second])

    def test_one_list_in_two_transformers_cached_differently(self):
        first, second = make_toy(seed=0), make_toy(seed=1)
        second.blocks = first.blocks
        kinds = {"first": DBCacheConfig, "second": DBPruneConfig}
        models = {"first": first, "second": second}
        apart = {name: run_toy(enable(copy.deepcopy(models[name]), reusing(kinds[name])), 6) for name in models}
        for name, model in models.items():
            enable(model, reusing(kinds[name], num_inference_steps=6))
        for _ in range(2):
            for name, model in models.items():
                assert same(run_toy(model, 6), apart[name])


class TestLimits:
    @both_kinds
    def test_one_reused_step_at_a_time(self, kind):
        model = enable(make_toy(), reusing(kind, max_continuous_cached_steps=1))
        run_toy(model, 9)
        assert reused(model) == [[2, 4, 6, 8]]

    @both_kinds
    def test_accumulated_differences_recover(self, kind):
        limit = 0.25
        model = enable(make_toy(), reusing(kind, max_accumulated_residual_diff_threshold=limit))
        run_toy(model, 20)
        records = cachedit.summary(model, logging=False)[0].main.records
        accumulated, recovered = 0.0, 0
        for record in records[2:]:
            assert record.reused == (accumulated < limit)
            if not record.reused:
                assert record.reason == "accumulated diff"
                recovered += 1
            accumulated = accumulated + record.diff if record.reused else 0.0
        assert recovered >= 3 and records[-1].step == 19

    @both_kinds
    def test_derivatives_serve_from_the_second_computed_step(self, kind):
        class Line(nn.Module):
            def forward(self, hidden_states, time):
                return hidden_states + time * torch.linspace(-1, 2, DIM)

        class Lines(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Line() for _ in range(4))

            def forward(self, time):
                hidden = torch.zeros(1, 3, DIM)
                for block in self.blocks:
                    hidden = block(hidden, time)
                return hidden

        for calibrator, exact in ((TaylorSeerCalibratorConfig(), True), (None, False)):
            model, plain = Lines(), Lines()
            adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_3)
            cachedit.enable_cache(adapter, reusing(kind), calibrator)
            outputs = [model(1.0 + step) for step in range(5)]
            assert reused(model) == [[2, 3, 4]]
            close = [torch.allclose(output, plain(1.0 + step)) for step, output in enumerate(outputs)]
            assert close == [True, True, exact, exact, exact]


class TestBadNumbers:
    @both_kinds
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("order", [0, 1, 2])
    def test_are_computed_counted_and_got_over(self, kind, value, order):
        calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        model = enable(make_toy(), reusing(kind), calibrator)
        with torch.no_grad():
            for step in range(8):
                inputs = toy_inputs(step, 8)
                if step == 3:
                    inputs["hidden_states"][0, 1] = value
                output = model(**inputs)
                assert output.isfinite().all() == (step != 3)
        (stats,) = cachedit.summary(model, logging=False)
        assert stats.computed_steps[:3] == [0, 1, 3] and stats.cached_steps[-3:] == [5, 6, 7]
        assert stats.main.nonfinite_diffs >= 1
        cachedit.refresh_context(model)
        run_toy(model, 8)
        assert cachedit.summary(model, logging=False)[0].main.nonfinite_diffs == 0


class TestExceptions:
    @both_kinds
    @pytest.mark.parametrize(
        ("place", "block", "step"), [("head", 0, 3), ("body", 2, 1), ("body", 3, 4), ("tail", 5, 3)]
    )
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_the_next_run_equals_a_fresh_one(self, kind, place, block, step, error):
        mask = [1, 1, 0, 0, 1, 0, 0, 0]
        config = static(mask, kind, num_inference_steps=8, Bn_compute_blocks=1)
        model = enable(make_toy(), config, TaylorSeerCalibratorConfig())
        expected = run_toy(model, 8)

        def fail(*_):
            raise error("out of memory")

        with torch.no_grad():
            for i in range(step):
                model(**toy_inputs(i, 8))
            handle = model.blocks[block].register_forward_pre_hook(fail)
            with pytest.raises(error, match="out of memory"):
                model(**toy_inputs(step, 8))
            handle.remove()
        for _ in range(2):
            assert same(run_toy(model, 8), expected)
            assert reused(model) == [zeros(mask)]
        cachedit.disable_cache(model)
        assert same(run_toy(model, 8), run_toy(make_toy(), 8))

    def test_outside_of_the_blocks(self):
        model = enable(make_toy(), reusing(num_inference_steps=6))
        expected = run_toy(model, 6)
        run_toy(model, 3)
        with pytest.raises(TypeError):
            model(nonsense=1)
        assert same(run_toy(model, 6), expected)


class TestCopies:
    @both_kinds
    def test_deepcopy_starts_without_requests(self, kind):
        model = enable(make_toy(), reusing(kind), TaylorSeerCalibratorConfig())
        with cachedit.request(model, "a"):
            expected = run_toy(model, 6)
        other = copy.deepcopy(model)
        assert cachedit.summary(other, logging=False)[0].bytes_held == 0
        assert same(run_toy(other, 6), expected)
        cachedit.disable_cache(other)
        assert same(run_toy(other, 6), run_toy(make_toy(), 6)) and controller_of(model).attached

    def test_deepcopy_of_a_pipeline(self):
        pipe = tiny_flux_pipeline()
        cachedit.enable_cache(pipe, reusing(), TaylorSeerCalibratorConfig())
        expected = call_flux(pipe, 6)
        other = copy.deepcopy(pipe)
        for each in (other, pipe, other):
            assert torch.equal(call_flux(each, 6), expected)
        cachedit.disable_cache(pipe)
        assert torch.equal(call_flux(other, 6), expected)
        cachedit.disable_cache(other)
        assert torch.equal(call_flux(other, 6), call_flux(tiny_flux_pipeline(), 6))

    def test_pickle_says_what_to_do(self):
        model = enable(make_toy(), reusing())
        for dump in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(TypeError, match=r"cannot be pickled: call cachedit\.disable_cache first"):
                dump(model)
        cachedit.disable_cache(model)
        assert same(run_toy(pickle.loads(pickle.dumps(model)), 3), run_toy(model, 3))

    @both_kinds
    def test_a_pipeline_is_saved_and_loaded(self, kind, tmp_path):
        pipe = tiny_flux_pipeline()
        names = list(pipe.transformer.state_dict())
        cachedit.enable_cache(pipe, reusing(kind))
        expected = call_flux(pipe, 6)
        assert list(pipe.transformer.state_dict()) == names
        pipe.save_pretrained(tmp_path)
        texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        again = type(pipe).from_pretrained(tmp_path, **dict.fromkeys(texts))
        again.set_progress_bar_config(disable=True)
        cachedit.enable_cache(again, reusing(kind))
        torch.testing.assert_close(call_flux(again, 6), expected)

    @both_kinds
    def test_another_dtype_and_back(self, kind):
        model = tiny_flux()
        cachedit.enable_cache(model, reusing(kind, num_inference_steps=6))
        expected = run_flux(model)
        model.to(torch.bfloat16)
        with torch.no_grad():
            for step in range(6):
                inputs = {name: value.bfloat16() for name, value in flux_inputs(step, 6).items()}
                assert model(**inputs).sample.dtype == torch.bfloat16
        assert reused(model) == [[2, 3, 4, 5]]
        model.to(torch.float32).load_state_dict(tiny_flux().state_dict())
        assert same(run_flux(model), expected)


def half_way(model):
    run_flux(model)
    flux = flux_inputs(0, 6)
    with torch.no_grad():
        model(**flux)


def failed(model):
    handle = model.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_flux(model)
    handle.remove()


def with_keys(model):
    if controller_of(model) is not None:
        for key in "ab":
            with cachedit.request(model, key):
                run_flux(model)


def copied(model):
    copy.deepcopy(model)


def doubled(model):
    model.to(torch.float64).to(torch.float32)


def wrapped(model):
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)


class TestDisabling:
    @both_kinds
    @pytest.mark.parametrize("state", [half_way, failed, with_keys, copied, doubled, wrapped], ids=lambda f: f.__name__)
    def test_restores_the_original_in_any_state(self, kind, state):
        plain, model = tiny_flux(), tiny_flux()
        cachedit.enable_cache(model, reusing(kind, num_inference_steps=6), TaylorSeerCalibratorConfig())
        for each in (plain, model):
            state(each)
        cachedit.disable_cache(model)
        assert traces(model) == traces(plain)
        assert same(run_flux(model), run_flux(plain))

    @both_kinds
    def test_within_a_context_or_a_forward(self, kind):
        model = enable(make_toy(), reusing(kind))
        before = traces(make_toy())
        with cachedit.request(model, "a"), controller_of(model).cache_context("cond"):
            run_toy(model, 3)
            handle = model.blocks[0].register_forward_pre_hook(lambda *_: (cachedit.disable_cache(model), None)[1])
            run_toy(model, 1)
            handle.remove()
        assert traces(model) == before
        assert same(run_toy(model, 4), run_toy(make_toy(), 4))
