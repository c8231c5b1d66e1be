import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, CacheType, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
from holds import reused, reusing, static
from toys import (
    HookExecutor,
    call_flux,
    flux_inputs,
    make_toy,
    run_toy,
    tiny_flux,
    tiny_flux_pipeline,
    toy_inputs,
)

NAN = float("nan")
P1 = ForwardPattern.Pattern_1
FAST = cachedit.steps_mask(total_steps=10, mask_policy="fast")


@pytest.fixture
def pipe():
    return tiny_flux_pipeline()


class TestFlux:
    """Works with enable_cache(pipe) alone: both block lists share one decision."""

    @pytest.mark.parametrize(("Fn", "Bn", "order"), [(1, 0, 1), (4, 1, 2), (2, 2, 1)])
    def test_transformer_equals_an_independent_executor(self, Fn, Bn, order):
        model = tiny_flux()
        forwards = [lambda i=i: model(**flux_inputs(i, 10)).sample for i in range(10)]
        lists = [(model.transformer_blocks, P1), (model.single_transformer_blocks, P1)]
        with torch.no_grad():
            expected = HookExecutor(lists, Fn, Bn, order).run(forwards, FAST)
            cachedit.enable_cache(
                model,
                static(FAST, Fn_compute_blocks=Fn, Bn_compute_blocks=Bn, num_inference_steps=10),
                TaylorSeerCalibratorConfig(taylorseer_order=order),
            )
            for _ in range(2):  # and the second request like the first
                for ours, theirs in zip([forward() for forward in forwards], expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert reused(model) == [[3, 5, 6, 8]]

    def test_default_config_on_a_pipeline(self, pipe):
        baseline = call_flux(pipe, 4)
        assert cachedit.enable_cache(pipe, DBCacheConfig(Fn_compute_blocks=6)) is pipe
        assert torch.equal(call_flux(pipe, 4), baseline)  # nothing left to reuse
        assert cachedit.summary(pipe, logging=False)[0].computed_steps == [0, 1, 2, 3]

    def test_requests_do_not_see_each_other(self, pipe):
        cachedit.enable_cache(pipe, reusing(), TaylorSeerCalibratorConfig())
        first = call_flux(pipe, 8)
        assert reused(pipe) == [[2, 3, 4, 5, 6, 7]]
        call_flux(pipe, 5, seed=3)
        call_flux(pipe, 6, size=48, batch=2)
        assert reused(pipe) == [[2, 3, 4, 5]]
        assert torch.equal(call_flux(pipe, 8), first)

    def test_mask_by_name_follows_the_request(self, pipe):
        cachedit.enable_cache(pipe, static("fast"))
        for steps in (10, 8, 28):
            call_flux(pipe, steps)
            mask = cachedit.steps_mask(total_steps=steps, mask_policy="fast")
            assert reused(pipe) == [[i for i, bit in enumerate(mask) if not bit]]

    def test_request_that_raised_half_way(self, pipe):
        cachedit.enable_cache(pipe, reusing(), TaylorSeerCalibratorConfig())
        expected = call_flux(pipe, 8)

        def stop(pipe, step, timestep, kwargs):
            if step == 4:
                raise KeyboardInterrupt
            return kwargs

        generator = torch.Generator().manual_seed(0)
        with pytest.raises(KeyboardInterrupt):
            pipe(
                prompt_embeds=torch.randn(1, 5, 16, generator=generator),
                pooled_prompt_embeds=torch.randn(1, 16, generator=generator),
                num_inference_steps=8,
                height=32,
                width=32,
                output_type="latent",
                callback_on_step_end=stop,
            )
        assert torch.equal(call_flux(pipe, 8), expected)

    def test_disabling_restores_everything(self, pipe):
        baseline = call_flux(pipe, 5)
        model = pipe.transformer
        before = dict(vars(model)), dict(vars(pipe)), list(model.state_dict())
        cachedit.enable_cache(pipe, reusing())
        assert list(model.state_dict()) == before[2]
        call_flux(pipe, 5)
        assert cachedit.disable_cache(pipe) is pipe
        assert (dict(vars(model)), dict(vars(pipe)), list(model.state_dict())) == before
        assert type(model.transformer_blocks) is nn.ModuleList
        assert torch.equal(call_flux(pipe, 5), baseline)
        cachedit.disable_cache(pipe)  # again: nothing happens

    def test_other_pipelines_and_the_classes_stay_as_they_are(self, pipe):
        other = tiny_flux_pipeline()
        classes = {cls: dict(vars(cls)) for cls in (type(pipe), type(pipe.transformer), nn.ModuleList, nn.Module)}
        baseline = call_flux(other, 5)
        cachedit.enable_cache(pipe, reusing())
        cached = call_flux(pipe, 5)
        assert torch.equal(call_flux(other, 5), baseline)
        cachedit.enable_cache(other, reusing(residual_diff_threshold=0.0))
        assert torch.equal(call_flux(other, 5), baseline)
        assert torch.equal(call_flux(pipe, 5), cached) and not torch.equal(cached, baseline)
        assert {cls: dict(vars(cls)) for cls in classes} == classes

    def test_guidance_branches_are_kept_apart(self, pipe):
        """True CFG calls the transformer twice per step under cache_context("cond") and ("uncond")."""
        cachedit.enable_cache(pipe, reusing(), TaylorSeerCalibratorConfig())

        def call(scale):
            g = torch.Generator().manual_seed(0)
            embeds = [torch.randn(1, 5, 16, generator=g) for _ in range(2)]
            pooled = [torch.randn(1, 16, generator=g) for _ in range(2)]
            return pipe(
                prompt_embeds=embeds[0],
                pooled_prompt_embeds=pooled[0],
                negative_prompt_embeds=embeds[1],
                negative_pooled_prompt_embeds=pooled[1],
                true_cfg_scale=scale,
                num_inference_steps=6,
                height=32,
                width=32,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images

        call(2.0)
        stats = cachedit.summary(pipe, logging=False)[0]
        assert sorted(stats.branches) == ["cond", "uncond"]
        assert stats.cached_steps == stats.cfg_cached_steps == [2, 3, 4, 5]
        assert stats.residual_diffs != stats.cfg_residual_diffs

    def test_scale_of_one_runs_as_if_there_were_no_uncond_branch(self, pipe):
        cachedit.enable_cache(pipe, reusing())
        call_flux(pipe, 6)
        assert list(cachedit.summary(pipe, logging=False)[0].branches) == ["cond"]


class TestRequestsOfABareTransformer:
    def adapter(self, model, **kwargs):
        return BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern, **kwargs)

    def test_num_inference_steps_ends_a_request_on_time(self):
        model = make_toy()
        cachedit.enable_cache(self.adapter(model), reusing(num_inference_steps=6))
        first, second = run_toy(model, 6), run_toy(model, 6)
        assert all(map(torch.equal, first, second))

    def test_refresh_context_starts_a_request(self):
        model = make_toy()
        cachedit.enable_cache(self.adapter(model), reusing())
        first = run_toy(model, 6)
        cachedit.refresh_context(model)
        assert all(map(torch.equal, run_toy(model, 6), first))
        cachedit.refresh_context(model, num_inference_steps=4, max_warmup_steps=3)
        run_toy(model, 4)
        assert reused(model) == [[3]]
        run_toy(model, 4)
        assert reused(model) == [[3]]

    def test_refresh_context_with_a_partial_config_keeps_the_rest(self):
        model = make_toy()
        cachedit.enable_cache(self.adapter(model), reusing(max_warmup_steps=1))
        cachedit.refresh_context(model, DBCacheConfig().reset(max_continuous_cached_steps=1))
        run_toy(model, 6)
        assert reused(model) == [[1, 3, 5]]

    def test_a_refresh_that_does_not_fit_changes_nothing(self):
        model = make_toy()
        cachedit.enable_cache(self.adapter(model), reusing())
        before = run_toy(model, 6)
        for changes in ({"Fn_compute_blocks": 9}, {"steps_computation_mask": [0, 3]}, {"residual_diff_threshold": "x"}):
            with pytest.raises((ValueError, TypeError)):
                cachedit.refresh_context(model, **changes)
        with pytest.raises(TypeError, match="no field 'Fn'"):
            cachedit.refresh_context(model, Fn=1)
        cachedit.refresh_context(model)
        assert all(map(torch.equal, run_toy(model, 6), before))

    def test_refresh_without_a_cache(self):
        with pytest.raises(ValueError, match="not enabled on this Toy"):
            cachedit.refresh_context(make_toy())

    @pytest.mark.parametrize("first", [False, True])
    def test_branches_by_call_order(self, first):
        model, lone = make_toy(), make_toy()
        config = {"enable_separate_cfg": True, "cfg_compute_first": first, "num_inference_steps": 5}
        cachedit.enable_cache(self.adapter(model), reusing(**config), TaylorSeerCalibratorConfig())
        cachedit.enable_cache(self.adapter(lone), reusing(num_inference_steps=5), TaylorSeerCalibratorConfig())
        with torch.no_grad():
            both = [[model(**toy_inputs(step, 5, seed=seed)) for seed in (1, 2)] for step in range(5)]
        for branch, seed in enumerate((1, 2)):
            cachedit.refresh_context(lone)
            assert all(map(torch.equal, [outputs[branch] for outputs in both], run_toy(lone, 5, seed=seed)))
        assert list(cachedit.summary(model, logging=False)[0].branches) == (
            ["uncond", "cond"] if first else ["cond", "uncond"]
        )

    def test_adapter_can_say_that_branches_come_in_turn(self):
        model = make_toy()
        cachedit.enable_cache(self.adapter(model, has_separate_cfg=True), reusing())
        with torch.no_grad():
            for step in range(6):
                model(**toy_inputs(step, 6))
        assert sorted(cachedit.summary(model, logging=False)[0].branches) == ["cond", "uncond"]


class TestEnabling:
    def test_again_reconfigures(self):
        model = tiny_flux()
        for limit, expected in ((1, [1]), (2, [1, 2])):
            cachedit.enable_cache(model, reusing(max_warmup_steps=0, max_cached_steps=limit))
            with torch.no_grad():
                for step in range(4):
                    model(**flux_inputs(step, 4))
            assert reused(model) == [expected]
        cachedit.disable_cache(model)
        assert "forward" not in vars(model)

    def test_the_user_s_config_is_not_changed_nor_watched(self):
        model, config = tiny_flux(), reusing(steps_computation_mask=[1, 0])
        before = config.as_dict()
        cachedit.enable_cache(model, config)
        config.steps_computation_mask.append(7)
        with torch.no_grad():
            model(**flux_inputs(0, 4))
        assert {**before, "steps_computation_mask": [1, 0, 7]} == config.as_dict()

    @pytest.mark.parametrize(
        ("config", "error", "message"),
        [
            (
                {"Fn_compute_blocks": 5, "Bn_compute_blocks": 2},
                ValueError,
                r"Fn_compute_blocks \+ Bn_compute_blocks = 7 \(5 \+ 2\) is more than the 6 blocks of transformer_",
            ),
            ({"Fn_compute_blocks": 0}, ValueError, "Fn_compute_blocks must be at least 1, got 0"),
            ({"residual_diff_threshold": NAN}, ValueError, "residual_diff_threshold must be a number, got NaN"),
            ({"steps_computation_mask": [1, 0, 1], "num_inference_steps": 4}, ValueError, "expected 4.*got 3"),
            ({"steps_computation_mask": [1, 2]}, ValueError, r"steps_computation_mask\[1\] must be 0 .* got 2"),
            ({"steps_computation_mask": "quick"}, ValueError, "'slow', 'medium', 'fast', 'ultra', got 'quick'"),
            ({"steps_computation_policy": "fixed"}, ValueError, "'dynamic', 'static', got 'fixed'"),
        ],
    )
    def test_bad_config_changes_nothing(self, config, error, message):
        model = tiny_flux()
        before = dict(vars(model))
        with pytest.raises(error, match=message):
            cachedit.enable_cache(model, DBCacheConfig(**config))
        assert dict(vars(model)) == before and type(model.transformer_blocks) is nn.ModuleList

    def test_mask_of_another_length_than_the_request(self, pipe):
        cachedit.enable_cache(pipe, static([1, 1, 0, 1]))
        with pytest.raises(ValueError, match=r"expected 6 \(num_inference_steps\), got 4"):
            call_flux(pipe, 6)
        call_flux(pipe, 4)
        assert reused(pipe) == [[2]]

    @pytest.mark.parametrize("target", [None, 3, "flux", object()])
    def test_targets_that_are_none(self, target):
        with pytest.raises(TypeError, match="pipe_or_adapter must be a pipeline with a transformer"):
            cachedit.enable_cache(target)

    def test_configs_of_the_wrong_type(self):
        with pytest.raises(TypeError, match="cache_config must be a DBCacheConfig, got dict"):
            cachedit.enable_cache(tiny_flux(), {"Fn_compute_blocks": 1})
        with pytest.raises(TypeError, match="calibrator_config must be a CalibratorConfig, got str"):
            cachedit.enable_cache(tiny_flux(), reusing(), "taylorseer")

    def test_cache_type_none_enables_nothing_and_disables_what_was(self):
        model = tiny_flux()
        for _ in range(2):
            assert cachedit.enable_cache(model, reusing(cache_type=CacheType.NONE)) is model
            assert "_cachedit_controller" not in vars(model)
            cachedit.enable_cache(model, reusing())
        cachedit.enable_cache(model, reusing(cache_type=CacheType.NONE))
        assert "_cachedit_controller" not in vars(model)

    def test_unknown_transformer(self):
        with pytest.raises(ValueError, match=r"Linear is not in the model table, and has no list .*BlockAdapter"):
            cachedit.enable_cache(nn.Linear(2, 2))
