import pytest
import torch

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern
from cachedit.pattern import BlockSignature, check_outputs, fits
from toys import DualBlock, SingleBlock, make_toy, run_toy

P = ForwardPattern
X, C = torch.zeros(1, 2, 8), torch.ones(1, 3, 8)


def test_streams_of_the_patterns():
    h, e = "hidden_states", "encoder_hidden_states"
    table = [((h, e), (h, e)), ((h, e), (e, h)), ((h, e), (h,)), ((h,), (h,)), ((h,), (h, e)), ((h,), (e, h))]
    assert [(pattern.In, pattern.Out) for pattern in P] == table
    assert P.supported_patterns() == list(P)


@pytest.mark.parametrize("pattern", list(P), ids=lambda p: p.name)
def test_pack_and_unpack_are_inverse(pattern):
    hidden, encoder = pattern.unpack(DualBlock(pattern), pattern.pack(X, C))
    assert hidden is X and (encoder is None if pattern.Return_H_Only else encoder is C)


def test_streams_are_found_by_position_and_by_name():
    signature = BlockSignature(DualBlock(P.Pattern_0), P.Pattern_0)
    for args, kwargs in [((X, C), {}), ((X,), {"encoder_hidden_states": C}),
                         ((), {"encoder_hidden_states": C, "hidden_states": X, "temb": None})]:  # fmt: skip
        assert signature.hidden(args, kwargs) is X and signature.encoder(args, kwargs) is C


def test_order_of_parameters_does_not_matter():
    class Block(torch.nn.Module):
        def forward(self, temb, encoder_hidden_states, hidden_states):
            return hidden_states, encoder_hidden_states

    signature = BlockSignature(Block(), P.Pattern_0)
    assert signature.hidden((None, C, X), {}) is X and signature.encoder((None, C, X), {}) is C


class Other(torch.nn.Module):
    def forward(self, x, context):
        return x * 1.1, context


class Annotated(torch.nn.Module):
    def forward(self, hidden_states, encoder_hidden_states) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, encoder_hidden_states


def test_other_names_are_taken_by_position_without_the_check():
    signature = BlockSignature(Other(), P.Pattern_0, check=False)
    assert signature.hidden((X, C), {}) is X and signature.encoder((X,), {"context": C}) is C
    with pytest.raises(ValueError, match=r"Other.forward\(x, context\) has no parameter 'hidden_states'.*"
                                         "check_forward_pattern=False"):  # fmt: skip
        BlockSignature(Other(), P.Pattern_0)


@pytest.mark.parametrize(
    ("block", "pattern", "message"),
    [
        (SingleBlock(P.Pattern_3), P.Pattern_0,
         r"Pattern_0 takes \(hidden_states, encoder_hidden_states\), but SingleBlock.forward\(hidden_states, "
         r"temb=None\) has no parameter 'encoder_hidden_states'; patterns that match: Pattern_3, Pattern_4, Pattern_5"),
        (Other(), P.Pattern_3, "Other.forward.* has no parameter 'hidden_states'; rename the parameters, or pass"),
    ],
)  # fmt: skip
def test_wrong_pattern_is_told_when_enabling(block, pattern, message):
    with pytest.raises(ValueError, match=message):
        BlockSignature(block, pattern)


def test_annotations_are_looked_at_where_asked():
    BlockSignature(Annotated(), P.Pattern_2)
    check_outputs(Annotated(), P.Pattern_1)
    check_outputs(DualBlock(P.Pattern_2), P.Pattern_0)  # says nothing
    with pytest.raises(ValueError, match=r"Annotated.forward.* is annotated otherwise; .*: Pattern_0, Pattern_1$"):
        check_outputs(Annotated(), P.Pattern_2)


@pytest.mark.parametrize(
    ("block", "outputs", "fitting"),
    [
        (Annotated(), False, list(P)),
        (Annotated(), True, [P.Pattern_0, P.Pattern_1, P.Pattern_4, P.Pattern_5]),
        (SingleBlock(P.Pattern_3), True, [P.Pattern_3, P.Pattern_4, P.Pattern_5]),
        (Other(), False, []),
    ],
)
def test_patterns_that_fit_a_signature(block, outputs, fitting):
    assert [pattern for pattern in P if fits(block, pattern, outputs)] == fitting


@pytest.mark.parametrize(
    ("actual", "claimed", "message"),
    [
        (P.Pattern_0, P.Pattern_2, r"DualBlock.forward\(.* returns hidden_states, but it returned a tuple of 2.*"
                                   "match: Pattern_0, Pattern_1$"),
        (P.Pattern_2, P.Pattern_1, "it returned a tensor of shape .*; patterns that match: Pattern_2$"),
        (P.Pattern_0, P.Pattern_1, r"\(2, 5, 8\), \(2, 3, 8\), but DualBlock.* returned \(2, 3, 8\), \(2, 5, 8\); "),
        (P.Pattern_3, P.Pattern_4, "it returned a tensor of shape .*; patterns that match: Pattern_3$"),
        (P.Pattern_4, P.Pattern_3, "returned a tuple of 2 .*; patterns that match: Pattern_4, Pattern_5$"),
    ],
)  # fmt: skip
def test_wrong_pattern_is_told_on_the_first_step(actual, claimed, message):
    model = make_toy(pattern=actual)
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=claimed)
    cachedit.enable_cache(adapter, DBCacheConfig(Fn_compute_blocks=1))
    with pytest.raises(TypeError, match=message):
        run_toy(model, 1)
    cachedit.disable_cache(model)
    run_toy(model, 1)


class TwoModalities(torch.nn.Module):
    def forward(self, text, video, encoder_hidden_states, audio):
        return video, audio


class TestOtherNames:
    """Blocks may call their streams otherwise."""

    def test_streams_are_found_by_these_names(self):
        signature = BlockSignature(TwoModalities(), ForwardPattern.Pattern_0, names=("video", "audio"))
        calls = (("t", "v", "e", "a"), {}), (("t", "v"), {"audio": "a"}), ((), {"video": "v", "audio": "a"})
        for args, kwargs in calls:
            assert (signature.hidden(args, kwargs), signature.encoder(args, kwargs)) == ("v", "a")

    def test_names_that_are_not_there(self):
        with pytest.raises(ValueError, match=r"TwoModalities.forward.*has no parameter 'image'"):
            BlockSignature(TwoModalities(), ForwardPattern.Pattern_3, names=("image", "audio"))
