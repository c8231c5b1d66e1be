"""A thousand requests leave nothing behind."""

import contextvars
import gc
import itertools
import threading
import weakref
from collections import Counter

import pytest
import torch

import cachedit
from cachedit import TaylorSeerCalibratorConfig
from cachedit.blocks import current_run
from cachedit.controller import controller_of
from holds import both_kinds, enable, reusing
from toys import make_toy, toy_inputs

STEPS = 3
INPUTS = [toy_inputs(step, STEPS) for step in range(STEPS)]
KEYS = itertools.count()


def cached(kind):
    return enable(make_toy(depth=3), reusing(kind, num_inference_steps=STEPS), TaylorSeerCalibratorConfig())


def run(model):
    with torch.no_grad():
        for step in range(STEPS):
            model(**INPUTS[step])


@pytest.fixture(scope="module", autouse=True)
def look_only_at_what_is_new():
    gc.collect()
    gc.freeze()  # what other modules hold stays as it is, and need not be gone through
    yield
    gc.unfreeze()


def alive():
    """Tensors and objects of this package that are reachable."""
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    tensors = sum(count for kind, count in kinds.items() if issubclass(kind, torch.Tensor))
    return tensors, sum(count for kind, count in kinds.items() if str(kind.__module__).startswith("cachedit."))


def one_after_the_other(model):
    run(model)


def refreshed(model):
    cachedit.refresh_context(model)
    run(model)


def reconfigured(model):
    cachedit.refresh_context(model, max_cached_steps=1)
    run(model)


def aborted(model):
    handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model)
    handle.remove()


def under_keys(model):
    key = next(KEYS)
    with cachedit.request(model, key):
        run(model)
    cachedit.drop_request(model, key)


def under_keys_within_limits(model):
    with cachedit.request(model, next(KEYS)):
        run(model)


def under_keys_in_threads(model):
    thread = threading.Thread(target=under_keys, args=(model,))
    thread.start()
    thread.join()


WAYS = {
    one_after_the_other: 1000,
    refreshed: 200,
    reconfigured: 200,
    aborted: 200,
    under_keys: 1000,
    under_keys_within_limits: 200,
    under_keys_in_threads: 200,
}


@both_kinds
@pytest.mark.parametrize("request_once", WAYS, ids=lambda way: way.__name__)
def test_tensors_and_states_after_many_requests(kind, request_once):
    model = cached(kind)
    cachedit.limit_requests(model, max_requests=4)
    run(model)
    for _ in range(8):
        request_once(model)
    before = alive()
    for _ in range(WAYS[request_once]):
        request_once(model)
    assert alive() == before
    assert current_run() is None
    assert all(not value for name, value in contextvars.copy_context().items() if name.name.startswith("cachedit_"))


@both_kinds
def test_disabling_frees_everything(kind):
    model = make_toy(depth=3)
    run(model)
    before = alive()
    enable(model, reusing(kind), TaylorSeerCalibratorConfig())
    for key in range(20):
        with cachedit.request(model, key):
            run(model)
    assert alive()[0] > before[0]
    cachedit.disable_cache(model)
    assert alive() == before


def test_a_model_that_is_let_go_of_is_freed():
    model = enable(make_toy(depth=3), reusing())
    with cachedit.request(model, "a"):
        run(model)
    gone = weakref.ref(model), weakref.ref(controller_of(model))
    del model
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
