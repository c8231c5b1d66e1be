import pytest
import torch

from cachedit.oracle import oracle
from toys import flux_inputs, make_toy, tiny_flux


def all_blocks(model):
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def blocks_run(every, model, step):
    """Which of the blocks one forward runs."""
    seen = []
    handles = [block.register_forward_pre_hook(lambda *_, i=i: seen.append(i)) for i, block in enumerate(every)]
    with torch.no_grad():
        model(**flux_inputs(step, 4))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("Fn", "Bn", "kept"), [(1, 0, [0]), (4, 1, [0, 1, 2, 3, 5]), (2, 2, [0, 1, 4, 5])])
def test_runs_the_body_as_the_list_says(Fn, Bn, kept):
    model = tiny_flux()
    every, names = all_blocks(model), list(model.state_dict())
    with oracle(model, [True, False, True], Fn, Bn):
        runs = [blocks_run(every, model, step) for step in range(6)]
    assert runs == [[0, 1, 2, 3, 4, 5], kept, [0, 1, 2, 3, 4, 5]] * 2
    assert list(model.state_dict()) == names
    assert all_blocks(model) == every


def test_puts_the_lists_back_after_an_error():
    model = tiny_flux()
    with pytest.raises(RuntimeError, match="boom"), oracle(model, [False], 1), torch.no_grad():
        model(**flux_inputs(0, 1))
        raise RuntimeError("boom")
    assert blocks_run(all_blocks(model), model, 0) == [0, 1, 2, 3, 4, 5]


def test_bad_arguments():
    with pytest.raises(ValueError, match="one entry per forward"), oracle(tiny_flux(), [], 1):
        pass
    with pytest.raises(ValueError, match="not in the model table"), oracle(make_toy(), [True], 1):
        pass
