import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern
from toys import DualBlock, SingleBlock, Toy, make_toy, run_toy

P = ForwardPattern


class TellingBlock(SingleBlock):
    def forward(self, hidden_states, temb=None) -> torch.Tensor:
        return super().forward(hidden_states, temb)


class PairBlock(DualBlock):
    def forward(self, hidden_states, encoder_hidden_states, temb=None) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden_states, encoder_hidden_states, temb)


def model(**lists):
    """A module with block lists: name=(block class, pattern, length)."""
    module = nn.Module()
    for name, (cls, pattern, length) in lists.items():
        setattr(module, name, nn.ModuleList(cls(pattern) for _ in range(length)))
    return module


MIXED = model(
    transformer_blocks=(PairBlock, P.Pattern_0, 3),
    single_transformer_blocks=(TellingBlock, P.Pattern_3, 5),
    encoder_layers=(TellingBlock, P.Pattern_3, 9),
)


def found(module=MIXED, **fields):
    (plan,) = BlockAdapter(transformer=module, auto=True, **fields).plans()
    ((item,),) = plan.sections
    return item.name, item.pattern


def test_the_longest_list_that_fits():
    assert found(forward_pattern=P.Pattern_0) == ("transformer_blocks", P.Pattern_0)
    assert found(forward_pattern=P.Pattern_3) == ("single_transformer_blocks", P.Pattern_3)  # without the outputs
    assert found(forward_pattern=P.Pattern_3, check_num_outputs=True, blocks_policy="min") == (
        "single_transformer_blocks", P.Pattern_3)  # fmt: skip
    assert found(forward_pattern=P.Pattern_3, blocks_policy="min") == ("transformer_blocks", P.Pattern_3)


def test_names_say_which_lists_count():
    assert found(check_prefixes=False) == ("encoder_layers", P.Pattern_3)
    assert found(allow_prefixes=["encoder"]) == ("encoder_layers", P.Pattern_3)
    pair = found(allow_suffixes=["PairBlock"], check_suffixes=True, forward_pattern=P.Pattern_1)
    assert pair == ("transformer_blocks", P.Pattern_1)


def test_the_pattern_is_read_off_where_signatures_tell_it():
    assert found() == ("single_transformer_blocks", P.Pattern_3)
    with pytest.raises(ValueError, match="in transformer_blocks fits Pattern_0, Pattern_1: give forward_pattern"):
        found(blocks_policy="min")
    with pytest.raises(ValueError, match="in blocks fits Pattern_3, Pattern_4, Pattern_5: give forward_pattern"):
        found(make_toy(pattern=P.Pattern_3))


def test_lists_that_are_given_win():
    assert found(blocks_name="encoder_layers", forward_pattern=P.Pattern_3) == ("encoder_layers", P.Pattern_3)
    assert found(blocks=MIXED.encoder_layers, forward_pattern=P.Pattern_3) == ("encoder_layers", P.Pattern_3)


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (nn.Linear(2, 2), {}, "Linear has no block list that fits any pattern .* its lists are none"),
        (model(blocks=(SingleBlock, P.Pattern_3, 2)), {"forward_pattern": P.Pattern_0}, "fits Pattern_0 .* are blocks"),
        (model(layers=(SingleBlock, P.Pattern_3, 2), blocks=(SingleBlock, P.Pattern_3, 2)),
         {"forward_pattern": P.Pattern_3}, "has 2 lists of 2 blocks: give blocks, of layers, blocks"),
        (MIXED, {"blocks_policy": "most"}, "blocks_policy must be 'max' or 'min', got 'most'"),
        (MIXED, {"forward_pattern": [P.Pattern_0, P.Pattern_1]}, "auto finds one block list, got 2 patterns"),
    ],
)  # fmt: skip
def test_where_it_is_not_clear(module, fields, message):
    with pytest.raises(ValueError, match=message):
        found(module, **fields)


def test_enabled_with_auto_equals_enabled_by_hand():
    by_hand, by_itself = make_toy(), make_toy()
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0)
    pattern = P.Pattern_0
    cachedit.enable_cache(BlockAdapter(transformer=by_hand, blocks=by_hand.blocks, forward_pattern=pattern), config)

    class Pipe:
        transformer = by_itself

    cachedit.enable_cache(BlockAdapter(pipe=Pipe(), auto=True, forward_pattern=pattern), config)
    for ours, theirs in zip(run_toy(by_itself, 4), run_toy(by_hand, 4)):
        assert torch.equal(ours, theirs)
    assert cachedit.summary(by_itself, logging=False)[0].cached_steps == [1, 2, 3]


def test_several_transformers():
    adapter = BlockAdapter(transformer=[make_toy(), make_toy(pattern=P.Pattern_3)], auto=True,
                           forward_pattern=[P.Pattern_0, P.Pattern_3])  # fmt: skip
    names = [[(item.name, item.pattern) for section in plan.sections for item in section] for plan in adapter.plans()]
    assert names == [[("blocks", P.Pattern_0)], [("blocks", P.Pattern_3)]]
    assert all(isinstance(plan.transformer, Toy) for plan in adapter.plans())
