import pytest
import torch
from torch import nn

import cachedit
from cachedit import DBCacheConfig, ForwardPattern
from cachedit.auto import Search
from cachedit.learn import learn_sections
from toys import DIM, LOOPS, DualBlock, Shaped, SingleBlock, Toy, flux_inputs, make_toy, tiny_flux, toy_inputs

P = ForwardPattern


def learn(model, inputs=None, **search):
    inputs = toy_inputs(0, 4) if inputs is None else inputs
    with torch.no_grad():
        candidates = Search(**search).candidates(model)
        output, groups = learn_sections(model, candidates, lambda: model(**inputs), search.get("blocks_policy", "max"))
        again = model(**inputs)
    output, again = (x if isinstance(x, torch.Tensor) else x[0] for x in (output, again))
    assert torch.equal(output, again)  # watching changes nothing, and leaves nothing behind
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(type(m) is nn.ModuleList for m in model.modules() if isinstance(m, nn.ModuleList))
    return [[(item.name, item.pattern) for item in group] for group in groups]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("pattern", list(P), ids=lambda p: p.name)
def test_every_pattern_is_seen(pattern, keyword, in_place):
    assert learn(make_toy(pattern=pattern, keyword=keyword, in_place=in_place)) == [[("blocks", pattern)]]


def test_lists_that_hand_on_their_streams_share_a_group():
    assert learn(tiny_flux(), flux_inputs(0, 4)) == [
        [("transformer_blocks", P.Pattern_1), ("single_transformer_blocks", P.Pattern_1)]
    ]


def test_blocks_that_are_compiled():
    model = tiny_flux()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    ((first, second),) = learn(model, flux_inputs(0, 4))
    assert first == ("transformer_blocks", P.Pattern_1) and second == ("single_transformer_blocks", P.Pattern_1)


class Unusual(Toy):
    """Blocks whose parameters have names of their own, two lists, and a short refiner before them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(DIM, DIM)

        def forward(self, x, freqs=None):
            return x + torch.tanh(self.mix(x))

    def __init__(self):
        super().__init__(depth=0)
        self.refiner = nn.ModuleList(self.Block() for _ in range(3))
        self.first, self.second = (nn.ModuleList(self.Block() for _ in range(n)) for n in (10, 8))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x = self.project(hidden_states)
        for block in self.refiner:
            x = block(x)
        for block in self.first:
            x = block(x, freqs=timestep)
        x = torch.cat([x, encoder_hidden_states], 1)
        for block in self.second:
            x = block(x)
        return x


def test_what_parameters_are_called_does_not_matter():
    torch.manual_seed(0)
    assert learn(Unusual().eval()) == [[("first", P.Pattern_3)], [("second", P.Pattern_3)]]
    assert learn(Unusual().eval(), blocks_policy="min") == [[("refiner", P.Pattern_3)]]


class Triple(SingleBlock):
    def forward(self, hidden_states, temb=None):
        return super().forward(hidden_states, temb), None, None


class Triples(Shaped):
    def forward(self, hidden_states, encoder_hidden_states, timestep):
        for block in self.blocks:
            hidden_states, _, _ = block(hidden_states)
        return hidden_states


class Keeping(nn.Module):
    """What the first list returns goes into the second, and past it; ``joined``: not before something is done to it."""

    def __init__(self, joined):
        super().__init__()
        self.joined = joined
        self.first, self.second = (nn.ModuleList(SingleBlock(P.Pattern_3) for _ in range(4)) for _ in range(2))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        for block in self.first:
            hidden_states = block(hidden_states)
        kept = hidden_states
        if self.joined:
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], 1)
        for block in self.second:
            hidden_states = block(hidden_states)
        return hidden_states[:, -kept.shape[1] :] * kept


@pytest.mark.parametrize("joined", [False, True])
def test_what_leaves_a_list_may_be_kept(joined):
    model = Keeping(joined).eval()
    assert learn(model) == [[("first", P.Pattern_3)], [("second", P.Pattern_3)]]
    mask = DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=0, steps_computation_mask=[1, 1, 0], steps_computation_policy="static"
    )
    cachedit.enable_cache(model, mask)
    with torch.no_grad():
        learnt, computed, reused = (model(**toy_inputs(0, 4)) for _ in range(3))
    assert cachedit.summary(model, logging=False)[1].cached_steps == [2]
    torch.testing.assert_close(reused, computed)
    assert torch.equal(learnt, computed)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Shaped("reversed"), r"its 6 blocks were called in the order \[5, 4, 3, 2, 1, 0\]"),
        (Shaped("twice"), r"its 6 blocks were called in the order \[0, 1, 2, 3, 4, 5, 0,"),
        (Shaped("early exit"), r"its 6 blocks were called in the order \[0, 1, 2, 3\]"),
        (Shaped("between"), "block 1 is not given what block 0 returned: the loop does something in between"),
        (Shaped("kept"), "what block 0 returned was kept for later, as for a skip connection"),
        (
            Shaped("other parameter", DualBlock, P.Pattern_0),
            "blocks take what they return as encoder_hidden_states",
        ),
        (Triples("", Triple), "blocks return something else than a tensor or two tensors"),
        *((make_toy(loop=loop), "blocks are fetched by index") for loop in ("index", "slice", "halves")),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "shape", getattr(value, "loop", "")),
)
def test_what_caching_would_break_is_refused(model, reason):
    with pytest.raises(ValueError, match=f"{type(model).__name__} .*cannot be cached as it is: blocks: {reason}"):
        learn(model.eval().requires_grad_(False))


@pytest.mark.parametrize("loop", [name for name in LOOPS if name not in ("index", "slice", "halves")])
def test_loops_that_are_served(loop):
    assert learn(make_toy(loop=loop)) == [[("blocks", P.Pattern_0)]]


def test_tensors_are_held_no_longer_than_by_the_model():
    """The most that is alive at a time is what the uncached model has alive, and the outputs of one block."""
    import gc

    model, alive = make_toy(depth=12), []

    def count(*_):
        shape = torch.Size((2, 5, DIM))
        alive.append(sum(type(o) is torch.Tensor and o.shape == shape for o in gc.get_objects()))

    handles = [block.register_forward_pre_hook(count) for block in model.blocks]
    with torch.no_grad():
        model(**toy_inputs(0, 4))
        plain = max(alive[1:])
        alive.clear()
        learn_sections(model, Search().candidates(model), lambda: model(**toy_inputs(0, 4)))
    for handle in handles:
        handle.remove()
    assert max(alive[1:]) <= plain + 1
