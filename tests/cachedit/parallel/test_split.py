"""Pieces of sequences, in one process: what is split where, and what follows of the others' lengths."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cachedit.parallel.plans import In
from cachedit.parallel.split import Pieces, hook_plan
from cachedit_kernels.ulysses.layout import even_splits


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    """A group is a number of ranks, and this one's."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: group.count)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: group.rank)


def pieces(count, rank):
    return Pieces(SimpleNamespace(count=count, rank=rank))


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_pieces_make_up_the_whole(count):
    x = torch.arange(2 * 19 * 3.0).reshape(2, 19, 3)
    parts = [pieces(count, rank).split(x, 1) for rank in range(count)]
    assert torch.equal(torch.cat(parts, 1), x)
    assert [part.shape[1] for part in parts] == list(even_splits(19, count))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("lengths", [(16,), (7, 64), (13, 101, 40)])
def test_lengths_follow_from_what_was_split(count, lengths):
    """Of a sequence alone and of several joined, on every rank the same."""
    splits = [even_splits(n, count) for n in lengths]
    joined = tuple(map(sum, zip(*splits)))
    for rank in range(count):
        own = pieces(count, rank)
        for i, n in enumerate(lengths):
            own.split(torch.zeros(1, n, 2), 1, f"stream{i}")
        for sizes in (*splits, joined):
            assert own.lengths(sizes[rank]) == sizes


@pytest.mark.parametrize("lengths", [(8, 9), (9, 9, 10), (5, 100, 101)])
def test_lengths_that_can_be_mistaken_are_asked_for_by_all_ranks(lengths, monkeypatch):
    """Rank 0 of 8 and 9 tokens on 2 ranks has 4 or 5; rank 1 has 4 of both."""
    asked = []
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda everyone, mine, group: asked.append((group.rank, mine))
    )
    splits = [even_splits(n, 2) for n in lengths]
    for rank in range(2):
        own = pieces(2, rank)
        for i, n in enumerate(lengths):
            own.split(torch.zeros(1, n, 2), 1, f"stream{i}")
        for sizes in splits[-2:]:
            own.lengths(sizes[rank])
    assert {rank for rank, _ in asked} == {0, 1}
    assert [mine for rank, mine in asked if rank == 0] == [sizes[0] for sizes in splits[-2:]]


def test_a_length_that_was_not_split():
    own = pieces(2, 1)
    own.split(torch.zeros(1, 10, 2), 1, "hidden_states")
    with pytest.raises(RuntimeError, match=r"attention runs over 7 tokens on rank 1 of 2.*'hidden_states': 10"):
        own.lengths(7)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rope = nn.Identity()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(2))

    def forward(self, hidden_states, mask=None, residuals=None, scale=1.0):
        positions = self.rope(torch.arange(hidden_states.shape[1])[:, None])
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states * scale, mask, residuals, positions


def test_hooks_split_by_name_place_and_output():
    model, own = Model(), pieces(2, 0)
    plan = {
        "": {"hidden_states": In(1, 3), "mask": In(1, 2), "residuals": In(1, 3)},
        "rope": {0: In(0, 2, split_output=True)},
    }
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    undo = hook_plan(model, plan, own)
    x, mask = torch.zeros(2, 10, 3), torch.ones(2, 10)
    out, kept, residuals, positions = model(x, mask=mask, residuals=[x, x])
    assert out.shape == (2, 5, 3) and kept.shape == (2, 5) and [r.shape[1] for r in residuals] == [5, 5]
    assert own.streams == {".hidden_states": (5, 5)} and positions.tolist() == [[0], [1], [2]]
    out, kept, residuals, _ = model(x, None)  # what is not given is not split
    assert kept is None and residuals is None and own.streams == {".hidden_states": (5, 5)}
    undo()
    assert model(x)[0].shape == x.shape
    assert before.keys() == {name for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        assert vars(module) == before[name], name


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"layers.0": {"hidden_states": In(1)}}, "cp_plan: Model has no module 'layers.0'"),
        ({"layers.*": {"hidden_states": In(1)}}, r"cp_plan: Model has no module 'layers.\*'"),
        ({"": {"states": In(1)}}, "forward of Model has no parameter 'states'; it has hidden_states, mask"),
    ],
)
def test_plans_that_do_not_fit(plan, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        hook_plan(model, {"": {"mask": In(1)}} | plan if "" not in plan else plan, pieces(2, 0))
    assert not model._forward_pre_hooks
