import copy
import dataclasses
import logging
import pickle
import types

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, PatchFunctor
from cachedit.patch_functor import is_patched
from toys import DualBlock, Toy, make_toy, run_toy, toy_inputs

CONFIG = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0)


def state(model):
    """Every attribute of every module within, by identity."""
    return [(name, {key: id(value) for key, value in vars(module).items()}) for name, module in model.named_modules()]


def run(model):
    with torch.no_grad():
        return model(**toy_inputs(0, 1))


def doubled(self, *args, **kwargs):
    return 2 * type(self).forward(self, *args, **kwargs)


class Double(PatchFunctor):
    """Changes a forward, a block's forward, a submodule, a buffer and a plain attribute, as cache_dit's functors do."""

    def _apply(self, transformer, shift=0.0, **kwargs):
        transformer.forward = doubled.__get__(transformer)
        first = transformer.blocks[0]
        first.forward = types.MethodType(lambda block, *args, **kw: DualBlock.forward(block, *args, **kw), first)
        transformer.project = nn.Identity()
        transformer.extra = nn.Linear(2, 2)
        transformer.register_buffer("shift", torch.tensor(shift))
        transformer._is_patched = True
        return transformer


def test_undo_puts_everything_back():
    model, other = make_toy(), make_toy()
    before, names, baseline, classes = state(model), list(model.state_dict()), run(model), dict(vars(Toy))
    functor = Double()
    assert functor.apply(model, shift=1.0) is model and is_patched(model)
    assert not torch.equal(run(model), baseline) and model.shift == 1.0
    assert torch.equal(run(other), baseline) and dict(vars(Toy)) == classes and not is_patched(other)
    functor.undo(model)
    assert state(model) == before and list(model.state_dict()) == names and not is_patched(model)
    assert torch.equal(run(model), baseline)
    functor.undo(model)  # again: nothing happens
    assert state(model) == before


def test_applied_once(caplog):
    model = make_toy()
    Double().apply(model)
    patched = state(model)
    assert Double().apply(model) is model
    assert state(model) == patched and "Toy is patched already: Double is not applied" in caplog.text


def test_applied_for_a_while():
    model = make_toy()
    before = state(model)
    functor = Double()
    with pytest.raises(KeyError), functor.applied(model):
        assert is_patched(model)
        raise KeyError
    assert state(model) == before
    functor.apply(model)
    with functor.applied(model):
        pass
    assert is_patched(model)  # it was before


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (lambda transformer: setattr(DualBlock, "forward", doubled), TypeError,
         "_apply set DualBlock.forward; set it on the object instead"),
        (lambda transformer: setattr(type(transformer), "forward", doubled), TypeError, "_apply set Sub.forward"),
        (lambda transformer: nn.Linear(1, 1), TypeError, "must change the transformer and return it, got Linear"),
        (lambda transformer: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)  # fmt: skip
def test_a_patch_that_fails_changes_nothing(body, error, message):
    class Sub(Toy):
        pass

    class Broken(PatchFunctor):
        def _apply(self, transformer):
            transformer.forward = doubled.__get__(transformer)
            return body(transformer)

    model = Sub()
    before, classes = state(model), (dict(vars(DualBlock)), dict(vars(Toy)), dict(vars(Sub)))
    with pytest.raises(error, match=message):
        Broken().apply(model)
    assert state(model) == before and not is_patched(model)
    assert (dict(vars(DualBlock)), dict(vars(Toy)), dict(vars(Sub))) == classes


def test_what_others_replaced_since_stays(caplog):
    model = make_toy()
    functor = Double()
    functor.apply(model)
    hook = model.forward = lambda *args, **kwargs: None
    with caplog.at_level(logging.WARNING):
        functor.undo(model)
    assert model.forward is hook and type(model.project) is nn.Linear and not hasattr(model, "shift")
    assert "Toy.forward has been replaced since it was patched" in caplog.text


def test_a_copy_is_undone_by_itself():
    model = make_toy()
    baseline = run(model)
    Double().apply(model)
    patched = run(model)
    twin = copy.deepcopy(model)
    Double().undo(twin)
    assert torch.equal(run(twin), baseline) and torch.equal(run(model), patched)
    assert list(twin.state_dict()) == list(make_toy().state_dict())


class Mark(PatchFunctor):
    def _apply(self, transformer):
        transformer.mark = 1


def test_a_patched_model_can_be_pickled():
    twin = pickle.loads(pickle.dumps(Mark().apply(make_toy())))
    assert twin.mark == 1
    Mark().undo(twin)
    assert not hasattr(twin, "mark")


def test_the_base_class_does_nothing_by_itself():
    with pytest.raises(NotImplementedError, match=r"PatchFunctor must override _apply"):
        PatchFunctor().apply(make_toy())


class Renamed(nn.Module):
    """A block whose streams have other names and come in another order."""

    def __init__(self):
        super().__init__()
        self.block = DualBlock(ForwardPattern.Pattern_0)

    def forward(self, context, sample, temb=None):
        return self.block(sample, context, temb)


def call_named(self, hidden_states, encoder_hidden_states, temb=None):
    return self.block(hidden_states, encoder_hidden_states, temb)


class Names(PatchFunctor):
    def _apply(self, transformer):
        for block in transformer.blocks:
            block.forward = call_named.__get__(block)


class TestInAnAdapter:
    """The functor is applied when the cache is enabled, before signatures are read, and undone when it is disabled."""

    @pytest.fixture
    def model(self):
        model = make_toy()
        model.blocks = nn.ModuleList(Renamed() for _ in range(4)).requires_grad_(False)
        return model

    def adapter(self, model, **fields):
        return BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_0,
                            check_forward_pattern=True, patch_functor=Names(), **fields)  # fmt: skip

    def test_enabled_and_disabled(self, model):
        before = state(model)
        with pytest.raises(ValueError, match="has no parameter 'hidden_states'"):
            cachedit.enable_cache(dataclasses.replace(self.adapter(model), patch_functor=None), CONFIG)
        for _ in range(2):
            cachedit.enable_cache(self.adapter(model), CONFIG)
            assert is_patched(model)
            run_toy(model, 4)
            assert cachedit.summary(model, logging=False)[0].cached_steps == [1, 2, 3]
        cachedit.disable_cache(model)
        assert state(model) == before

    def test_a_config_that_does_not_fit_leaves_no_patch(self, model):
        before = state(model)
        with pytest.raises(ValueError, match="more than the 4 blocks"):
            cachedit.enable_cache(self.adapter(model), DBCacheConfig(Fn_compute_blocks=9))
        assert state(model) == before

    def test_what_users_have_patched_stays_patched(self, model):
        functor = Names()
        functor.apply(model)
        patched = state(model)
        cachedit.enable_cache(self.adapter(model), CONFIG)
        cachedit.disable_cache(model)
        assert state(model) == patched
