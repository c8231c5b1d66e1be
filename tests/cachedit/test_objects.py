"""Blocks may return an object that is no tensor in the place of the encoder stream, as BAGEL's return its cache."""

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, CacheType, DBCacheConfig, DBPruneConfig, ForwardPattern, TaylorSeerCalibratorConfig
from toys import SingleBlock, run_toy

P = ForwardPattern
TWO_OUTPUTS = [P.Pattern_0, P.Pattern_1, P.Pattern_4, P.Pattern_5]
CONFIGS = {
    "DBCache": DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0),
    "DBCache, head and tail": DBCacheConfig(CacheType.DBCache, 2, 2, max_warmup_steps=2, residual_diff_threshold=9.0),
    "DBPrune": DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0),
}


class KeyValueCache:
    """Opaque to the engine."""


class Layer(SingleBlock):
    """A block of pattern 3, and what it is given besides."""

    def __init__(self, pattern):
        super().__init__(P.Pattern_3)
        self.second = pattern
        self.returns = None

    def forward(self, hidden_states, encoder_hidden_states=None, past_key_values=None, temb=None):
        hidden = super().forward(hidden_states, temb)
        given = encoder_hidden_states if past_key_values is None else past_key_values
        return self.second.pack(hidden, given if self.returns is None else self.returns)


class Backbone(nn.Module):
    """Hands its cache on from layer to layer, as ``past_key_values`` or in the encoder stream's own place."""

    def __init__(self, pattern, own_place=False, positional=False):
        super().__init__()
        self.pattern, self.own_place, self.positional = pattern, own_place, positional
        self.layers = nn.ModuleList(Layer(pattern) for _ in range(6))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        cache = self.given = KeyValueCache()  # another one in each call
        temb = torch.sin(timestep.reshape(-1, 1, 1))
        for layer in self.layers:
            if self.positional:
                output = layer(hidden_states, cache, None, temb)
            elif self.own_place:
                output = layer(hidden_states, encoder_hidden_states=cache, temb=temb)
            else:
                output = layer(hidden_states, past_key_values=cache, temb=temb)
            hidden_states, cache = output if self.pattern.Return_H_First else output[::-1]
        self.returned = cache
        return hidden_states


class Plain(nn.Module):
    """The same layers without a cache, of pattern 3."""

    def __init__(self, other):
        super().__init__()
        self.layers = nn.ModuleList(SingleBlock(P.Pattern_3) for _ in other.layers)
        self.load_state_dict(other.state_dict())

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        temb = torch.sin(timestep.reshape(-1, 1, 1))
        for layer in self.layers:
            hidden_states = layer(hidden_states, temb=temb)
        return hidden_states


def make(pattern, **kwargs):
    torch.manual_seed(0)
    return Backbone(pattern, **kwargs).eval().requires_grad_(False)


def enable(model, config, pattern):
    adapter = BlockAdapter(transformer=model, blocks=model.layers, forward_pattern=pattern)
    cachedit.enable_cache(adapter, config, TaylorSeerCalibratorConfig())


def pruned_or_cached(model):
    return cachedit.summary(model, logging=False)[0].cached_steps


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "how", [{}, {"own_place": True}, {"positional": True}], ids=["beside", "own place", "position"]
)
@pytest.mark.parametrize("pattern", TWO_OUTPUTS)
def test_the_object_is_handed_on_and_the_stream_cached(pattern, how, config):
    model = make(pattern, **how)
    plain = Plain(model)
    enable(model, config, pattern)
    enable(plain, config, P.Pattern_3)
    model.register_forward_hook(lambda *_: ends.append(model.returned is model.given))
    ends = []
    for ours, theirs in zip(run_toy(model, 6), run_toy(plain, 6)):
        assert torch.equal(ours, theirs)
    assert ends == [True] * 6
    assert pruned_or_cached(model) == pruned_or_cached(plain) == [2, 3, 4, 5]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("other", [KeyValueCache(), 3], ids=["object", "number"])
def test_another_object_than_the_blocks_before_is_an_error(config, other):
    """A skipped block could not return it."""
    model = make(P.Pattern_0)
    model.layers[3].returns = other  # in the body of each configuration
    enable(model, config, P.Pattern_0)
    message = f"Layer.forward.* returned a {type(other).__name__} that is not the KeyValueCache of the blocks before"
    with pytest.raises(TypeError, match=message):
        run_toy(model, 1)
