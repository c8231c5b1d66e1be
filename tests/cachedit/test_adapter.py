import pytest
import torch

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier, PatchFunctor
from toys import DualBlock, make_toy, run_toy, tiny_flux

P = ForwardPattern


def names(adapter):
    return [[[item.name for item in section] for section in plan.sections] for plan in adapter.plans()]


def test_names_are_found_by_identity_and_lists_by_name():
    model = make_toy()
    by_list = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=P.Pattern_0)
    by_name = BlockAdapter(transformer=model, blocks_name="blocks", forward_pattern=P.Pattern_0)
    assert names(by_list) == names(by_name) == [[["blocks"]]]
    assert by_name.plans()[0].sections[0][0].blocks is model.blocks


def test_transformer_of_the_pipeline():
    class Pipe:
        transformer = make_toy()

    plan = BlockAdapter(pipe=Pipe, blocks_name="blocks", forward_pattern=P.Pattern_0).plans()[0]
    assert plan.transformer is Pipe.transformer


def test_nested_names():
    outer = torch.nn.Module()
    outer.language_model = make_toy()
    adapter = BlockAdapter(transformer=outer, blocks=outer.language_model.blocks, forward_pattern=P.Pattern_0)
    assert names(adapter) == [[["language_model.blocks"]]]


def test_lists_share_a_decision_where_the_table_or_the_user_says_so():
    flux = tiny_flux()
    lists = {"blocks": [flux.transformer_blocks, flux.single_transformer_blocks], "forward_pattern": P.Pattern_1}
    together, apart = [["transformer_blocks", "single_transformer_blocks"]], [
        ["transformer_blocks"], ["single_transformer_blocks"]]  # fmt: skip
    assert names(BlockAdapter(transformer=flux, **lists)) == [together]
    assert names(BlockAdapter(transformer=flux, linked=False, **lists)) == [apart]

    model = make_toy()
    model.more = make_toy(seed=1).blocks
    lists = {"blocks_name": ["blocks", "more"], "forward_pattern": [P.Pattern_0, P.Pattern_1]}
    assert names(BlockAdapter(transformer=model, **lists)) == [[["blocks"], ["more"]]]
    assert names(BlockAdapter(transformer=model, linked=True, **lists)) == [[["blocks", "more"]]]


def test_separate_lists_decide_and_count_separately():
    flux = tiny_flux()
    adapter = BlockAdapter(
        transformer=flux,
        blocks=[flux.transformer_blocks, flux.single_transformer_blocks],
        forward_pattern=P.Pattern_1,
        linked=False,
    )
    cachedit.enable_cache(adapter, DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0))
    from toys import flux_inputs

    with torch.no_grad():
        for step in range(4):
            flux(**flux_inputs(step, 4))
    stats = cachedit.summary(adapter, logging=False)
    assert [entry.blocks for entry in stats] == ["transformer_blocks", "single_transformer_blocks"]
    assert [entry.cached_steps for entry in stats] == [[1, 2, 3]] * 2
    assert stats[0].residual_diffs != stats[1].residual_diffs


def test_several_transformers():
    models = [make_toy(), make_toy(seed=1, pattern=P.Pattern_3)]
    adapter = BlockAdapter(
        transformer=models,
        blocks=[model.blocks for model in models],
        forward_pattern=[P.Pattern_0, P.Pattern_3],
    )
    assert names(adapter) == [[["blocks"]], [["blocks"]]]
    cachedit.enable_cache(adapter, DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0))
    run_toy(models[0], 3)
    run_toy(models[1], 5)
    assert [entry.cached_steps for entry in cachedit.summary(adapter, logging=False)] == [[1, 2], [1, 2, 3, 4]]
    cachedit.disable_cache(adapter)
    assert all(type(model.blocks) is torch.nn.ModuleList for model in models)


class Annotated(DualBlock):
    """As some blocks of diffusers: it returns two tensors."""

    def forward(self, hidden_states, encoder_hidden_states, temb=None) -> torch.Tensor:
        return super().forward(hidden_states, encoder_hidden_states, temb)


def test_annotations_count_only_where_asked():
    model = make_toy()
    model.blocks = torch.nn.ModuleList(Annotated(P.Pattern_0) for _ in range(3))
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=P.Pattern_0)
    cachedit.enable_cache(adapter, DBCacheConfig(Fn_compute_blocks=1))
    run_toy(model, 2)


def test_a_list_of_one_transformer_is_that_transformer():
    model = make_toy()
    model.more = make_toy(seed=1).blocks
    lists, patterns = [model.blocks, model.more], [P.Pattern_0, P.Pattern_1]
    modifiers = [ParamsModifier(max_warmup_steps=1), None]
    for transformer in (model, [model]):
        for nested in (False, True):
            wrap = (lambda value: [value]) if nested else (lambda value: value)
            (plan,) = BlockAdapter(transformer=transformer, blocks=wrap(lists), forward_pattern=wrap(patterns),
                                   params_modifiers=wrap(modifiers)).plans()  # fmt: skip
            assert [item.pattern for section in plan.sections for item in section] == patterns
            assert plan.modifiers == modifiers


def test_modifiers_are_laid_out_like_the_lists():
    models = [make_toy(), make_toy(seed=1)]
    models[0].more = make_toy(seed=2).blocks
    given = {"blocks_name": [["blocks", "more"], "blocks"], "forward_pattern": P.Pattern_0}
    m, n = ParamsModifier(max_warmup_steps=1), ParamsModifier(max_warmup_steps=2)
    for modifiers, expected in [
        (None, [[None, None], [None]]),
        (m, [[m, m], [m]]),
        ([m, n], [[m, m], [n]]),
        ([[m, None], n], [[m, None], [n]]),
    ]:
        plans = BlockAdapter(transformer=models, params_modifiers=modifiers, **given).plans()
        assert [plan.modifiers for plan in plans] == expected


def test_the_table_groups_lists_where_their_patterns_allow_it():
    flux = tiny_flux()
    flux.tail = make_toy(pattern=P.Pattern_3).blocks
    given = ["transformer_blocks", "single_transformer_blocks", "tail"]
    patterns = [P.Pattern_1, P.Pattern_1, P.Pattern_3]
    together = BlockAdapter(transformer=flux, blocks_name=given, forward_pattern=patterns)
    assert names(together) == [[["transformer_blocks", "single_transformer_blocks"], ["tail"]]]
    old = BlockAdapter(transformer=flux, blocks_name=given[:2], forward_pattern=[P.Pattern_1, P.Pattern_3])
    assert names(old) == [[["transformer_blocks"], ["single_transformer_blocks"]]]


def test_the_functor_is_handed_on_and_nothing_is_patched_yet():
    class Functor(PatchFunctor):
        def _apply(self, transformer):
            raise AssertionError

    model, functor = make_toy(), Functor()
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=P.Pattern_0, patch_functor=functor)
    assert adapter.plans()[0].patch_functor is functor


MODEL = make_toy()
MODEL.single = make_toy(pattern=P.Pattern_3).blocks
MODEL.annotated = torch.nn.ModuleList([Annotated(P.Pattern_0)])
GOOD = {"transformer": MODEL, "blocks": MODEL.blocks, "forward_pattern": P.Pattern_0}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"transformer": None}, ValueError, "transformer: give BlockAdapter a transformer, or a pipe that has one"),
        ({"transformer": 3}, TypeError, "transformer must be a torch.nn.Module, got int"),
        ({"blocks": None}, ValueError, r"blocks: give BlockAdapter the block list\(s\), or their blocks_name"),
        ({"blocks": MODEL.blocks[0]}, TypeError, r"blocks\[0\] must be a torch.nn.ModuleList, got DualBlock"),
        ({"blocks": torch.nn.ModuleList()}, ValueError, r"blocks\[0\] is an empty list"),
        ({"blocks": make_toy().blocks}, ValueError, r"blocks\[0\] is not a submodule of Toy"),
        ({"blocks": [MODEL.blocks, MODEL.blocks]}, ValueError, "a block list is given twice"),
        ({"blocks_name": ["a", "b"]}, ValueError, r"expected one name per block list \(1\), got 2"),
        ({"blocks": None, "blocks_name": "layers"}, ValueError, "Toy has no block list 'layers'; its lists are blocks"),
        ({"forward_pattern": None}, ValueError, "forward_pattern is missing; patterns are Pattern_0, Pattern_1"),
        ({"forward_pattern": "Pattern_0"}, TypeError, "must be a ForwardPattern .* got 'Pattern_0'"),
        ({"forward_pattern": 6}, TypeError, "must be a ForwardPattern .* got 6"),
        ({"forward_pattern": [P.Pattern_0] * 2}, ValueError, r"or one per block list \(1\), got 2"),
        ({"transformer": [MODEL] * 2, "blocks": [MODEL.blocks] * 3}, ValueError,
         r"blocks: expected one entry per transformer \(2\), got list of 3"),
        ({"transformer": [MODEL, 3], "blocks": None, "blocks_name": "blocks"}, TypeError, r"transformer\[1\] must be"),
        ({"params_modifiers": [None] * 2}, ValueError, r"params_modifiers: expected one, .* \(1\), got 2"),
        ({"patch_functor": PatchFunctor}, TypeError, "patch_functor must be a PatchFunctor, got type"),
        ({"check_num_outputs": True, "blocks": MODEL.annotated}, ValueError,
         "Pattern_0 returns .*, but Annotated.forward.* is annotated otherwise; patterns that match: Pattern_2$"),
        ({"blocks": [MODEL.blocks, MODEL.single], "forward_pattern": [P.Pattern_0, P.Pattern_3], "linked": True},
         ValueError, "same streams, got blocks: Pattern_0, single: Pattern_3"),
    ],
)  # fmt: skip
def test_bad_fields_change_nothing(fields, error, message):
    before = dict(vars(MODEL))
    with pytest.raises(error, match=message):
        cachedit.enable_cache(BlockAdapter(**{**GOOD, **fields}), DBCacheConfig(Fn_compute_blocks=1))
    assert dict(vars(MODEL)) == before and type(MODEL.blocks) is torch.nn.ModuleList
