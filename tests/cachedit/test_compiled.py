"""A cached transformer under torch.compile: how many graphs, breaks and recompilations, and the same pictures."""

import contextlib
import copy
import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.flop_counter import flop_registry

import cachedit
from cachedit import (
    BlockAdapter,
    DBPruneConfig,
    DMDCalibratorConfig,
    ForwardPattern,
    PolicyConfig,
    TaylorSeerCalibratorConfig,
    TeaCacheConfig,
)
from cachedit.compiled import run_in_passes
from cachedit.embedded import load_pipeline
from cachedit.policy import Decision
from first_blocks import CASES
from holds import enable, reused, reusing, same, static
from toys import Shaped, call_flux, flux_inputs, make_toy, run_flux, run_toy, tiny_flux, tiny_flux_pipeline, toy_inputs

STEPS = 5
MASK = [1, 1, 0, 1, 0]
P3 = ForwardPattern.Pattern_3


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled(model, backend="eager", **options):
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def graphs():
    """Graphs compiled so far; there must not have been a break."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def no_more():
    """Nothing is compiled inside."""
    return torch._dynamo.config.patch(error_on_recompile=True)


flux_run = partial(run_flux, steps=STEPS)


def dynamic(**fields):
    return reusing(num_inference_steps=STEPS, **fields)


def masked(mask=MASK, **fields):
    return static(mask, num_inference_steps=len(mask), **fields)


def cached_flux(config=None, double=2, single=2):
    model = tiny_flux(double, single)
    cachedit.enable_cache(model, config or dynamic(), TaylorSeerCalibratorConfig())
    return model


def build(name, **changes):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    if changes:
        model = type(model).from_config({**model.config, **changes})
    return model.eval().requires_grad_(False), case.call()


def run_branches(model, call):
    """Each step runs both branches, as pipelines with guidance do, if the model can tell them apart."""
    outputs = []
    tells = hasattr(model, "cache_context")
    for step in range(STEPS):
        for i, branch in enumerate(("cond", "uncond") if tells else ("default",)):
            times = {name: call[name] * (1 - step / STEPS) for name in ("timestep", "t") if name in call}
            name = "cap_feats" if "cap_feats" in call else "encoder_hidden_states"
            text = [t + i for t in call[name]] if isinstance(call[name], list) else call[name] + i
            with torch.no_grad(), model.cache_context(branch) if tells else contextlib.nullcontext():
                output = model(**{**call, **times, name: text})[0]
            outputs += output if isinstance(output, list) else [output]
    return outputs


def shaped(shape):
    torch.manual_seed(0)
    model = Shaped(shape).eval().requires_grad_(False)
    model.pattern = P3
    return model


class TestGraphs:
    """Head, compute and reuse: three graphs without a break, whatever changes from step to step."""

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            *((f"{name}Transformer2DModel", dynamic) for name in ("Flux", "QwenImage", "ZImage")),
            ("WanTransformer3DModel", dynamic),
            ("WanTransformer3DModel", masked),
        ],
    )
    def test_models(self, name, config):
        model, call = build(name)
        cachedit.enable_cache(model, config(), TaylorSeerCalibratorConfig())
        expected, steps = run_branches(model, call), reused(model)
        run = compiled(model)
        with no_more():  # not even for the second branch
            first, second = run_branches(run, call), run_branches(run, call)
        assert graphs() == (3 if config is dynamic else 2)
        assert same(first, expected)
        assert same(second, expected)
        assert reused(model) == steps != [[]]

    def test_embedded_model(self):
        def draw():
            return pipe("a red ring", num_inference_steps=8, output_type="latent", generator=seeded()).images

        def seeded():
            return torch.Generator().manual_seed(0)

        pipe = load_pipeline()
        cachedit.enable_cache(pipe, reusing(residual_diff_threshold=0.3), TaylorSeerCalibratorConfig())
        expected = draw()
        assert reused(pipe) != [[]]
        pipe.transformer = compiled(pipe.transformer)
        with no_more():
            assert torch.equal(draw(), expected)
        assert graphs() == 3

    @pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "ChromaTransformer2DModel"])
    def test_lists_that_decide_separately(self, name):
        model, call = build(name, num_layers=2, num_single_layers=2)
        # The first list reuses where the second computes and the other way round.
        settings = [dynamic(steps_computation_mask=mask) for mask in ([1, 1, 0, 1, 0], [1, 1, 1, 0, 0])]
        cachedit.enable_cache(model, dynamic(), params_modifiers=[cachedit.ParamsModifier(c) for c in settings])
        expected = run_branches(model, call)
        assert reused(model) == [[2, 4], [3, 4]]
        with no_more():
            assert same(run_branches(compiled(model), call), expected)
        # The head, and then each list's body, computed or reused; what the first did is not seen by the second.
        assert graphs() == 5
        assert reused(model) == [[2, 4], [3, 4]]

    def test_static_masks_of_separate_lists(self):
        model, call = build("Flux2Transformer2DModel", num_layers=2, num_single_layers=2)
        cachedit.enable_cache(model, masked())
        expected = run_branches(model, call)
        assert same(run_branches(compiled(model), call), expected)
        assert graphs() == 2

    def test_static_mask_reads_nothing_back(self, monkeypatch):
        model = cached_flux(masked())
        expected = flux_run(model)

        def tolist(tensor):
            raise AssertionError("a value was read")

        run = compiled(model)
        flux_run(run)
        for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, tolist)
        outputs = flux_run(run)
        monkeypatch.undo()
        assert same(outputs, expected)

    def test_requests_steps_thresholds_and_masks(self):
        pipe = tiny_flux_pipeline(double=2, single=2)
        cachedit.enable_cache(pipe, reusing(), TaylorSeerCalibratorConfig())
        eager = [call_flux(pipe, 6), call_flux(pipe, 9, seed=1)]
        whole, pipe.transformer = pipe.transformer, compiled(pipe.transformer)
        call_flux(pipe, 4)
        assert graphs() == 3
        with no_more():
            assert same([call_flux(pipe, 6), call_flux(pipe, 9, seed=1)], eager)
            for key in ("a", "b"):
                with cachedit.request(whole, key):
                    assert torch.equal(call_flux(pipe, 6), eager[0])
            for config in (reusing(residual_diff_threshold=0.5), reusing(steps_computation_mask=[1, 1, 0, 1, 0, 1])):
                cachedit.enable_cache(pipe, config, TaylorSeerCalibratorConfig())
                call_flux(pipe, 6)
        assert graphs() == 3

    @pytest.mark.parametrize("dynamic_shapes", [None, True])
    def test_two_resolutions(self, dynamic_shapes):
        model = cached_flux(double=1, single=1)
        expected = [flux_run(model, tokens=tokens) for tokens in (20, 28, 36)]
        run = compiled(model, backend="aot_eager", dynamic=dynamic_shapes)
        outputs = [flux_run(run, tokens=20), flux_run(run, tokens=28)]
        with no_more():
            outputs.append(flux_run(run, tokens=36))
        assert graphs() <= (3 if dynamic_shapes else 6)
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_repeated_blocks_compile_as_without_a_cache(self):
        model = tiny_flux(2, 2)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        expected = flux_run(model)
        uncached = graphs()
        cachedit.enable_cache(model, dynamic(residual_diff_threshold=0.0))
        with no_more():
            assert same(flux_run(model), expected)
            cachedit.enable_cache(model, dynamic())
            flux_run(model)
        assert reused(model) == [[2, 3, 4]]
        assert graphs() == uncached

    def test_pre_ops_cost_nothing_twice(self):
        """What the second pass repeats, in FLOPs of the graphs after dead code is gone."""

        def count(config):
            model = copy.deepcopy(load_pipeline().transformer)
            inputs = {
                "hidden_states": torch.randn(1, 64, model.config.in_channels),
                "encoder_hidden_states": torch.randn(1, 7, model.config.joint_attention_dim),
                "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
                "timestep": torch.ones(1),
                "img_ids": torch.zeros(64, 3),
                "txt_ids": torch.zeros(7, 3),
            }
            cachedit.enable_cache(model, config)
            found = []
            run = compiled(
                model, backend=aot_autograd(fw_compiler=lambda graph, _: found.append(flops(graph)) or graph)
            )
            with torch.no_grad():
                for _ in range(STEPS):
                    run(**inputs)
            return found

        head, _, reuse = count(dynamic())
        _, whole = count(masked())
        assert 0 <= head + reuse - whole < 0.01 * whole


def flops(graph):
    """FLOPs of a traced graph."""
    total = 0
    for node in graph.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in flop_registry:
            values = torch.utils._pytree.tree_map_only(torch.fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
            total += flop_registry[packet](*values[0], **values[1], out_val=node.meta["val"])
    return total


class TestSameAsEager:
    def check(self, make, config, calibrator=None, **adapter):
        expected = run_toy(enable(make(), config, calibrator, **adapter), STEPS)
        model = enable(make(), config, calibrator, **adapter)
        run = compiled(model)
        assert same(run_toy(run, STEPS), expected)
        with no_more():
            assert same(run_toy(run, STEPS), expected)  # all of it compiled now
        return model

    @pytest.mark.parametrize(
        ("pattern", "in_place", "config"),
        [
            *((pattern, False, dynamic) for pattern in ForwardPattern),
            (ForwardPattern.Pattern_1, True, dynamic),
            (ForwardPattern.Pattern_1, True, masked),
            (ForwardPattern.Pattern_4, False, masked),
        ],
    )
    def test_patterns(self, pattern, in_place, config):
        settings = config(Fn_compute_blocks=2, Bn_compute_blocks=1)
        model = self.check(lambda: make_toy(pattern=pattern, in_place=in_place), settings, TaylorSeerCalibratorConfig())
        assert graphs() == (3 if config is dynamic else 2)
        assert reused(model) != [[]]

    @pytest.mark.parametrize("loop", ["enumerate", "zip", "list"])
    def test_loops(self, loop):
        assert reused(self.check(lambda: make_toy(loop=loop, keyword=False), dynamic())) == [[2, 3, 4]]

    @pytest.mark.parametrize(
        "calibrator",
        [
            DMDCalibratorConfig(),
            TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states", enable_encoder_calibrator=False),
        ],
        ids=["fitted weights", "one stream, outputs kept"],
    )
    def test_calibrators(self, calibrator):
        self.check(make_toy, dynamic(max_continuous_cached_steps=1), calibrator)
        assert graphs() == 3

    def test_additions_between_blocks(self):
        self.check(lambda: shaped("between"), dynamic(Fn_compute_blocks=2, Bn_compute_blocks=1))
        assert graphs() == 3

    def test_additions_in_place(self):
        """What a loop writes into a stream after the body or between lists does not reach what is stored."""

        class Adding(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                toy = make_toy(pattern=P3, depth=4)
                self.first, self.second = toy.blocks, copy.deepcopy(toy.blocks)

            def forward(self, hidden_states, encoder_hidden_states, timestep):
                hidden = hidden_states * timestep.reshape(-1, 1, 1)
                for blocks in (self.first, self.second):
                    for block in blocks:
                        hidden = block(hidden_states=hidden)
                    hidden.add_(0.1)
                return hidden

        for linked in (False, True):
            counters.clear()
            models = [Adding().eval().requires_grad_(False) for _ in range(2)]
            for model in models:
                adapter = BlockAdapter(
                    transformer=model, blocks=[model.first, model.second], forward_pattern=P3, linked=linked
                )
                cachedit.enable_cache(adapter, dynamic(Fn_compute_blocks=2), TaylorSeerCalibratorConfig())
            eager, other = models
            run = compiled(other)
            for _ in range(2):
                assert same(run_toy(run, STEPS), run_toy(eager, STEPS))
            assert graphs() == (3 if linked else 5)

    def test_policy_of_ones_own(self):
        class EverySecond:
            def decide(self, step):
                if step.diff is None:
                    return Decision.MEASURE
                return Decision.REUSE if step.step % 2 else Decision.COMPUTE

        config = PolicyConfig(policy=EverySecond, num_inference_steps=STEPS, Fn_compute_blocks=1)
        assert reused(self.check(make_toy, config)) == [[1, 3]]
        assert graphs() == 3

    @pytest.mark.parametrize("config", [dynamic, masked], ids=["dynamic", "static mask"])
    def test_streams_that_change_within_a_request(self, config):
        def run(model):
            sizes = (5, 5, 7, 7, 5)
            with torch.no_grad():
                return [model(**toy_inputs(step, STEPS, tokens=size)) for step, size in enumerate(sizes)]

        eager, model = (enable(make_toy(), config(), TaylorSeerCalibratorConfig()) for _ in range(2))
        run_toy(eager, STEPS)
        expected = run(eager)
        compiled_model = compiled(model)
        run_toy(compiled_model, STEPS)
        for ours, theirs in zip(run(compiled_model), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert reused(model) == reused(eager)

    def test_inductor(self):
        expected = flux_run(cached_flux())
        outputs = flux_run(compiled(cached_flux(), backend="inductor"))
        assert graphs() == 3
        torch.testing.assert_close(outputs, expected)


class TestOnAndOff:
    def test_enabled_after_compiling_and_disabled_again(self):
        model = tiny_flux(2, 2)
        run = compiled(model)
        plain = flux_run(run)
        cachedit.enable_cache(model, dynamic(), TaylorSeerCalibratorConfig())
        assert same(flux_run(run), flux_run(cached_flux()))
        cachedit.disable_cache(model)
        with no_more():
            assert same(flux_run(run), plain)
        assert graphs() == 1 + 3

    def test_module_compile(self):
        model = cached_flux()
        expected = flux_run(model)
        model.compile(backend="eager", fullgraph=True)
        assert same(flux_run(model), expected)
        assert graphs() == 3

    def test_called_by_what_is_compiled(self):
        """There is one break, at the call."""
        model = cached_flux()
        expected = flux_run(model)
        outer = torch.compile(lambda **inputs: model(**inputs), backend="eager")
        assert same(flux_run(outer), expected)
        assert sum(counters["graph_break"].values()) == 1
        assert counters["stats"]["unique_graphs"] == 3

    def test_gradients_run_the_plain_forward_compiled(self):
        model = cached_flux().requires_grad_(True)
        run = compiled(model, backend="aot_eager")
        run(**flux_inputs(0, STEPS)).sample.sum().backward()
        assert model.x_embedder.weight.grad is not None
        assert graphs() == 1

    def test_error_ends_the_request(self):
        model = enable(make_toy(), dynamic())
        run = compiled(model)
        run_toy(run, STEPS)
        with torch.no_grad():
            run(**toy_inputs(0, STEPS))
            with pytest.raises(Exception, match=r"shape|size|mat1"):
                run(**{**toy_inputs(1, STEPS), "hidden_states": torch.randn(2, 5, 3)})
        assert same(run_toy(run, STEPS), run_toy(model, STEPS))


class TestLeftToEager:
    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (DBPruneConfig(Fn_compute_blocks=1, num_inference_steps=STEPS, residual_diff_threshold=0.1), "DBPrune"),
            (TeaCacheConfig(num_inference_steps=STEPS), "TeaCache"),
        ],
        ids=["DBPrune", "TeaCache"],
    )
    def test_says_so_once(self, config, reason, caplog):
        caplog.set_level(logging.INFO)
        model = tiny_flux(2, 2)
        cachedit.enable_cache(model, config)
        expected = flux_run(model)
        assert same(flux_run(compiled(model)), expected)
        assert [reason in record.message for record in caplog.records if "not compiled" in record.message] == [True]
        assert counters["stats"]["unique_graphs"] == 0

    @pytest.mark.parametrize("head", [1, 2])
    def test_outputs_of_the_head_that_are_kept(self, head, caplog):
        """A skip connection from before the cut cannot be handed over; one from the body can."""
        caplog.set_level(logging.INFO)

        eager, model = (enable(shaped("kept"), dynamic(Fn_compute_blocks=head)) for _ in range(2))
        assert same(run_toy(compiled(model), STEPS), run_toy(eager, STEPS))
        assert ("keeps what single blocks return" in caplog.text) is (head == 2)
        assert graphs() == (0 if head == 2 else 3)

    def test_eager_is_not_asked_for_passes(self, monkeypatch):
        model = cached_flux()
        forward = vars(model)["forward"]
        monkeypatch.setattr(forward, "run_in_passes", None)
        flux_run(model)
        monkeypatch.setattr(forward, "run_in_passes", run_in_passes)
        with contextlib.suppress(TypeError):
            flux_run(compiled(model))
        assert graphs() == 3
