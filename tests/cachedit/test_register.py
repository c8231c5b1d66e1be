import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, BlockAdapterRegister, DBCacheConfig, ForwardPattern, ParamsModifier
from cachedit.adapter import plan_for
from cachedit.models import MODELS, PIPELINES
from toys import Toy, call_flux, make_toy, run_toy, tiny_flux, tiny_flux_pipeline

P = ForwardPattern
CONFIG = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0)


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    monkeypatch.setattr(BlockAdapterRegister, "_factories", {})


def register(name, calls=None, **fields):
    @BlockAdapterRegister.register(name)
    def adapter(pipe, **kwargs):
        if calls is not None:
            calls.append(kwargs)
        blocks = pipe.transformer.blocks
        fields.setdefault("forward_pattern", P.Pattern_0)
        return BlockAdapter(pipe=pipe, transformer=pipe.transformer, blocks=blocks, **fields)

    return adapter


class ToyPipeline:
    def __init__(self):
        self.transformer = make_toy()

    def progress_bar(self, iterable=None, total=None):
        return iterable

    def __call__(self, steps):
        self.progress_bar(total=steps)
        return run_toy(self.transformer, steps)


def test_a_registered_pipeline_is_enabled_by_itself():
    pipe = ToyPipeline()
    assert cachedit.get_adapter(pipe) is None
    register("ToyPipe")
    assert cachedit.enable_cache(pipe, CONFIG) is pipe
    for steps in (4, 3):  # and the pipeline tells when a request starts
        pipe(steps)
        assert cachedit.summary(pipe, logging=False)[0].cached_steps == list(range(1, steps))
    cachedit.disable_cache(pipe)
    assert type(pipe.transformer.blocks) is nn.ModuleList and "progress_bar" not in vars(pipe)


def test_a_registered_transformer_is_enabled_by_itself():
    register("Toy")
    model = make_toy()
    cachedit.enable_cache(model, CONFIG)
    run_toy(model, 3)
    assert cachedit.summary(model, logging=False)[0].cached_steps == [1, 2]
    adapter = cachedit.get_adapter(model)
    assert adapter.pipe is None and adapter.transformer is model


def test_compiled_transformers_are_known_by_their_own_class():
    register("Toy")
    model, pipe = make_toy(), tiny_flux_pipeline()
    assert cachedit.get_adapter(torch.compile(model)).plans()[0].transformer is model
    flux, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer)
    assert cachedit.get_adapter(pipe).plans()[0].transformer is flux


def test_a_function_may_leave_fields_to_the_defaults():
    @BlockAdapterRegister.register("Toy")
    def adapter(pipe):
        return BlockAdapter(blocks_name="blocks", forward_pattern=P.Pattern_0)

    pipe, model = ToyPipeline(), make_toy()
    assert cachedit.get_adapter(pipe).pipe is pipe
    assert cachedit.get_adapter(pipe).plans()[0].transformer is pipe.transformer
    assert cachedit.get_adapter(model).plans()[0].transformer is model


def test_the_longest_name_counts_and_users_come_before_the_table():
    register("Toy", has_separate_cfg=False)
    register("ToyPipeline", has_separate_cfg=True)
    register("T", has_separate_cfg=False)
    assert BlockAdapterRegister.has_separate_cfg(ToyPipeline())
    assert not BlockAdapterRegister.has_separate_cfg(make_toy())

    pipe = tiny_flux_pipeline()
    assert len(cachedit.get_adapter(pipe).plans()[0].sections) == 1

    @BlockAdapterRegister.register("Flux")
    def apart(pipe, **kwargs):
        names = ["transformer_blocks", "single_transformer_blocks"]
        return BlockAdapter(pipe=pipe, blocks_name=names, forward_pattern=P.Pattern_1, linked=False, **kwargs)

    cachedit.enable_cache(pipe, CONFIG)
    call_flux(pipe, 3)
    assert [entry.blocks for entry in cachedit.summary(pipe, logging=False)] == apart(pipe).blocks_name


def test_modifiers_of_a_registered_adapter_count():
    register("Toy", params_modifiers=ParamsModifier(max_warmup_steps=3))
    model = make_toy()
    cachedit.enable_cache(model, CONFIG)
    run_toy(model, 5)
    assert cachedit.summary(model, logging=False)[0].cached_steps == [3, 4]
    cachedit.enable_cache(model, CONFIG, params_modifiers=ParamsModifier(max_warmup_steps=2))
    run_toy(model, 5)
    assert cachedit.summary(model, logging=False)[0].cached_steps == [2, 3, 4]


def test_keywords_are_handed_on():
    calls = []
    register("Toy", calls)
    BlockAdapterRegister.get_adapter(make_toy(), skip_post_init=True)
    assert calls == [{"skip_post_init": True}]
    assert BlockAdapterRegister.get_adapter(tiny_flux(), linked=False).linked is False


@pytest.mark.parametrize("target", [tiny_flux, tiny_flux_pipeline], ids=["transformer", "pipeline"])
def test_the_table_as_an_adapter(target):
    target = target()
    transformer = getattr(target, "transformer", target)
    adapter = cachedit.get_adapter(target)
    assert adapter.pipe is (None if target is transformer else target)
    (plan,) = adapter.plans()
    assert plan == plan_for(transformer)
    assert adapter.blocks_name == [["transformer_blocks", "single_transformer_blocks"]]
    assert not BlockAdapterRegister.has_separate_cfg(target) and not BlockAdapterRegister.has_separate_cfg(adapter)


def test_pipelines_with_two_transformers():
    pipe = tiny_flux_pipeline()
    pipe.transformer_2 = tiny_flux(seed=1)
    plans = cachedit.get_adapter(pipe).plans()
    assert [plan.transformer for plan in plans] == [pipe.transformer, pipe.transformer_2]
    pipe.transformer_2 = make_toy()
    assert cachedit.get_adapter(pipe) is None


def test_how_a_pipeline_of_the_table_calls_its_branches():
    pipe = type("FluxImg2ImgPipeline", (), {})()
    pipe.transformer = tiny_flux()
    assert BlockAdapterRegister.has_separate_cfg(pipe) and not BlockAdapterRegister.has_separate_cfg(pipe.transformer)
    assert cachedit.get_adapter(pipe).plans() == [plan_for(pipe.transformer, pipe)]


def test_what_is_supported():
    assert BlockAdapterRegister.is_supported(tiny_flux()) and not BlockAdapterRegister.is_supported(make_toy())
    assert cachedit.get_adapter(make_toy()) is None and cachedit.get_adapter(object()) is None
    count, names = cachedit.supported_pipelines()
    assert count == len(names) == len(PIPELINES) and set(names) == set(PIPELINES)
    register("Toy")
    assert BlockAdapterRegister.is_supported(make_toy())
    assert cachedit.supported_pipelines() == (count + 1, ["Toy", *names])
    assert "| Toy |  | registered |  |  |" in cachedit.supported_matrix()


def test_matrix_has_a_line_per_pipeline():
    lines = cachedit.supported_matrix().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["pipeline", "transformer", "block lists", "guidance", "tested"]
    assert [row[0] for row in cells[2:] if row[0]] == cachedit.supported_pipelines()[1]
    assert {row[1] for row in cells[2:]} == set(MODELS)
    blocks = "transformer_blocks 1 + single_transformer_blocks 1"
    assert ["FluxPipeline", "FluxTransformer2DModel", blocks, "named", "yes"] in cells
    blocks = "joint_transformer_blocks 1; single_transformer_blocks 3"
    assert ["AuraFlowPipeline", "AuraFlowTransformer2DModel", blocks, "one batch", "yes"] in cells
    assert ["EasyAnimateInpaintPipeline", "EasyAnimateTransformer3DModel", "transformer_blocks 0", "", "no"] in cells


def test_not_registered_where_it_says_so():
    @BlockAdapterRegister.register("Toy", supported=False)
    def adapter(pipe):
        raise AssertionError

    assert cachedit.get_adapter(make_toy()) is None


def test_a_function_that_returns_no_adapter():
    BlockAdapterRegister.register("Toy")(lambda pipe: 3)
    with pytest.raises(TypeError, match="registered for 'Toy' must return a BlockAdapter, got 3"):
        cachedit.enable_cache(make_toy(), CONFIG)


def test_names_are_those_of_the_class_not_of_its_bases():
    class Derived(Toy):
        pass

    register("Toy")
    assert cachedit.get_adapter(Derived()) is None
