"""Many requests on one model: each gives the bits that it gives alone, from one thread or several."""

import asyncio
import gc
import random
import threading
import weakref

import pytest
import torch

import cachedit
from cachedit import DBCacheConfig, TaylorSeerCalibratorConfig
from holds import both_kinds, enable, reused, reusing, same, static
from toys import make_toy, run_toy, toy_inputs

JOBS = {f"job {i}": 5 + i % 4 for i in range(8)}  # key -> steps; the number is the seed of its inputs


def cached(kind=DBCacheConfig, **fields):
    return enable(make_toy(), reusing(kind, **fields), TaylorSeerCalibratorConfig())


def forward(model, key, step, total):
    with torch.no_grad():
        return model(**toy_inputs(step, total, seed=int(key.split()[-1])))


def alone(key, steps, **config):
    """What a request gives on a model of its own."""
    model = cached(**config)
    return [forward(model, key, step, steps) for step in range(steps)]


def run(model, key, steps):
    outputs = []
    for step in range(steps):
        with cachedit.request(model, key, num_inference_steps=steps):
            outputs.append(forward(model, key, step, steps))
    return outputs


def in_threads(*works):
    """Run functions in threads of their own; what they raise comes out here."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def during_a_forward(model, work):
    """Have ``work`` done by another thread in the midst of the next forward."""
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: (handle.remove(), in_threads(work))[1])


class TestSideBySide:
    @both_kinds
    def test_interleaved_from_one_thread(self, kind):
        model = cached(kind)
        steps = [key for key, count in JOBS.items() for _ in range(count)]
        random.Random(0).shuffle(steps)
        outputs = {key: [] for key in JOBS}
        for key in steps:
            with cachedit.request(model, key, num_inference_steps=JOBS[key]):
                outputs[key].append(forward(model, key, len(outputs[key]), JOBS[key]))
        for key, count in JOBS.items():
            assert same(outputs[key], alone(key, count, kind=kind))
            with cachedit.request(model, key):
                assert reused(model) == [list(range(2, count))]

    @both_kinds
    def test_from_four_threads(self, kind):
        model = cached(kind)
        outputs = {}

        def work(keys):
            for _ in range(3):
                for key in keys:
                    outputs[key] = run(model, key, JOBS[key])

        keys = list(JOBS)
        in_threads(*(lambda part=keys[i::4]: work(part) for i in range(4)))
        for key, count in JOBS.items():
            assert same(outputs[key], alone(key, count, kind=kind))

    def test_from_asyncio_tasks(self):
        model = cached()

        async def job(key):
            outputs = []
            with cachedit.request(model, key, num_inference_steps=JOBS[key]):
                for step in range(JOBS[key]):
                    await asyncio.sleep(0)  # the others run now, in this thread
                    outputs.append(await asyncio.to_thread(forward, model, key, step, JOBS[key]))
            return outputs

        async def server():
            return await asyncio.gather(*map(job, JOBS))

        for key, outputs in zip(JOBS, asyncio.run(server()), strict=True):
            assert same(outputs, alone(key, JOBS[key]))

    def test_beside_the_request_without_a_key(self):
        model = cached()
        outputs = []
        for step in range(6):
            outputs.append(forward(model, "job 3", step, 6))
            with cachedit.request(model, "other"):
                forward(model, "job 5", step, 6)
        assert same(outputs, alone("job 3", 6))

    def test_nested(self):
        model = cached()
        outer, inner = [], []
        for step in range(6):
            with cachedit.request(model, "outer"):
                with cachedit.request(model, "inner"):
                    inner.append(forward(model, "job 2", step, 6))
                outer.append(forward(model, "job 1", step, 6))
        assert same(outer, alone("job 1", 6)) and same(inner, alone("job 2", 6))

    def test_two_models_under_one_key(self):
        models = [enable(make_toy(seed=seed), reusing()) for seed in (0, 1)]
        with cachedit.request(models[0], "key"), cachedit.request(models[1], "key"):
            outputs = [run_toy(model, 5) for model in models]
        for model, each in zip(models, outputs, strict=True):
            assert same(run_toy(model, 5), each)


class TestTwoThreadsOnOneRequest:
    def test_is_an_error_and_harms_nobody(self):
        model = cached()
        outputs, errors = [], []

        def intrude():
            with (
                cachedit.request(model, "key"),
                pytest.raises(RuntimeError, match=r"two threads run one request.*cachedit\.request") as e,
            ):
                forward(model, "job 7", 0, 6)
            errors.append(e)

        for step in range(6):
            with cachedit.request(model, "key"):
                if step in (1, 3):
                    during_a_forward(model, intrude)
                outputs.append(forward(model, "job 1", step, 6))
        assert same(outputs, alone("job 1", 6)) and len(errors) == 2

    @pytest.mark.parametrize("how", ["refresh", "announce"])
    def test_starting_a_request_that_runs(self, how):
        model = cached()

        def restart():
            with pytest.raises(RuntimeError, match="two threads"):
                if how == "refresh":
                    cachedit.refresh_context(model)
                else:
                    model._cachedit_controller.announce(None)

        during_a_forward(model, restart)
        run_toy(model, 1)

    def test_many_at_once_end_in_results_or_this_error(self):
        """Nothing else may come out, whatever is dropped, limited or looked at meanwhile."""
        model = cached()
        cachedit.limit_requests(model, max_requests=3, max_bytes=4000)
        refused = []

        def work(seed):
            draw = random.Random(seed)
            for step in range(60):
                key = draw.randrange(6)
                with cachedit.request(model, key):
                    try:
                        forward(model, "job 0", step, 60)
                    except RuntimeError as error:
                        assert "two threads" in str(error)
                        refused.append(key)
                cachedit.summary(model, logging=False)
                cachedit.drop_request(model, draw.randrange(6))

        in_threads(*(lambda seed=seed: work(seed) for seed in range(4)))
        assert all(request.owner is None for request in model._cachedit_controller.requests._by_key.values())
        assert same(run_toy(model, 5), run_toy(cached(), 5))


class TestBeginningAndEnding:
    def test_a_forward_after_the_last_step_begins_anew(self):
        model = cached()
        for _ in range(3):
            assert same(run(model, "job 1", 6), alone("job 1", 6))

    def test_the_next_request_of_a_key_may_have_other_steps(self):
        model = enable(make_toy(), static("fast"))
        for steps in (8, 10, 8):
            run(model, "job 1", steps)
            with cachedit.request(model, "job 1"):
                (stats,) = cachedit.summary(model, logging=False)
            mask = cachedit.steps_mask(total_steps=steps, mask_policy="fast")
            assert stats.cached_steps == [i for i, bit in enumerate(mask) if not bit]

    def test_refresh_begins_the_one_whose_context_it_is_in(self):
        model = cached()
        for key in ("a", "b"):
            with cachedit.request(model, key):
                run_toy(model, 3)
        with cachedit.request(model, "a"):
            cachedit.refresh_context(model)
            assert same(run_toy(model, 3), run_toy(cached(), 3))
            assert reused(model) == [[2]]
        with cachedit.request(model, "b"):
            run_toy(model, 1)
            assert reused(model) == [[2, 3]]

    def test_dropping(self):
        model = cached()
        with cachedit.request(model, "a"):
            run_toy(model, 3)
            ring = weakref.ref(model._cachedit_controller.branches["default"].states[0].residuals.rings[0])
            cachedit.drop_request(model, "a")
            gc.collect()
            assert ring() is None
            assert same(run_toy(model, 3), run_toy(cached(), 3))
        cachedit.drop_request(model, "a")
        cachedit.drop_request(model, "a")  # again: nothing happens
        cachedit.drop_request(make_toy(), "a")

    def test_dropping_one_that_runs(self):
        model = cached()
        with cachedit.request(model, "a"):
            during_a_forward(model, lambda: cachedit.drop_request(model, "a"))
            first = run_toy(model, 1)
            assert same(first + run_toy(model, 3), run_toy(cached(), 1) + run_toy(cached(), 3))

    def test_summary_is_of_the_context_or_of_the_last_request(self):
        model = cached()
        run_toy(model, 3)
        with cachedit.request(model, "a"):
            assert cachedit.summary(model, logging=False)[0].branches == {}
            run_toy(model, 4)
            assert reused(model) == [[2, 3]]
        assert reused(model) == [[2, 3]]  # outside: the last that ran
        run_toy(model, 2)
        assert reused(model) == [[2, 3, 4]]
        with cachedit.request(model, "a"):
            assert reused(model) == [[2, 3]]

    @pytest.mark.parametrize(
        ("key", "steps", "error", "message"),
        [
            ([1], None, TypeError, "key must be hashable, got list"),
            ({}, None, TypeError, "key must be hashable, got dict"),
            ("a", 0, ValueError, "num_inference_steps must be an integer of at least 1, got 0"),
            ("a", 2.5, ValueError, "num_inference_steps must be an integer of at least 1, got 2.5"),
            ("a", 4, ValueError, r"steps_computation_mask.*expected 4"),
        ],
    )
    def test_bad_arguments_change_nothing(self, key, steps, error, message):
        model = enable(make_toy(), static([1, 0, 1]))
        with pytest.raises(error, match=message), cachedit.request(model, key, num_inference_steps=steps):
            pytest.fail("not to be reached")
        assert not model._cachedit_controller.requests._by_key
        assert len(run_toy(model, 3)) == 3

    def test_bad_arguments_elsewhere(self):
        model = cached()
        with pytest.raises(TypeError, match="key must be hashable, got list"):
            cachedit.drop_request(model, [])
        for limits in ({"max_requests": 0}, {"max_bytes": 0}):
            with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
                cachedit.limit_requests(model, **limits)
        with pytest.raises(ValueError, match="not enabled on this Toy"):
            cachedit.limit_requests(make_toy())
        with pytest.raises(ValueError, match="not enabled on this Toy"), cachedit.request(make_toy(), "a"):
            pytest.fail("not to be reached")


class TestLimits:
    def keys(self, model):
        return [key for key in model._cachedit_controller.requests._by_key if isinstance(key, str)]

    def step(self, model, *keys):
        for key in keys:
            with cachedit.request(model, key):
                run_toy(model, 1)

    def test_the_least_recently_used_is_dropped(self, caplog):
        model = cached()
        run_toy(model, 3)  # the one without a key does not count
        cachedit.limit_requests(model, max_requests=3)
        self.step(model, "a", "b", "c", "a", "d")
        assert self.keys(model) == ["c", "a", "d"]
        self.step(model, "b")
        assert self.keys(model) == ["a", "d", "b"]
        assert sum("more than 3 requests at a time" in record.message for record in caplog.records) == 1
        cachedit.limit_requests(model, max_requests=1)
        assert self.keys(model) == ["b"]
        assert reused(model) == [[]]
        run_toy(model, 1)
        assert reused(model) == [[2, 3]]

    @pytest.mark.parametrize("limits", [{"max_requests": 1}, {"max_bytes": 1}], ids=str)
    def test_what_runs_is_spared(self, limits):
        model = cached()
        cachedit.limit_requests(model, **limits)
        outputs = []
        with cachedit.request(model, "a"):
            for step in range(6):
                during_a_forward(model, lambda: self.step(model, "b", "c", "b"))
                outputs.append(forward(model, "job 1", step, 6))
            assert reused(model) == [[2, 3, 4, 5]]
        assert same(outputs, alone("job 1", 6))

    @both_kinds
    def test_freed_requests_go_on_at_their_step(self, kind):
        mask = [1, 1, 0, 0, 1, 0, 0, 0]
        model = enable(make_toy(), static(mask, kind), TaylorSeerCalibratorConfig())

        def advance(steps):
            with cachedit.request(model, "a", num_inference_steps=8):
                for step in steps:
                    forward(model, "job 1", step, 8)
                return cachedit.summary(model, logging=False)[0]

        held = advance(range(3)).bytes_held
        assert held > 0
        cachedit.limit_requests(model, max_bytes=held)
        self.step(model, "b")
        with cachedit.request(model, "a"):
            assert cachedit.summary(model, logging=False)[0].bytes_held == 0
        stats = advance(range(3, 8))
        assert stats.cached_steps == [2, 5, 6, 7]  # step 3 had nothing to reuse; the mask goes on
        assert {r.step: r.reason for r in stats.main.records}[3] == "nothing stored"

    def test_enough_bytes_free_nothing_and_fewer_free_the_oldest(self):
        model = cached()
        self.step(model, "a", "b", "c")
        with cachedit.request(model, "a"):
            size = cachedit.summary(model, logging=False)[0].bytes_held
        cachedit.limit_requests(model, max_bytes=3 * size)
        requests = model._cachedit_controller.requests
        assert [requests.find(key).count_bytes() for key in "abc"] == [size] * 3
        cachedit.limit_requests(model, max_bytes=3 * size - 1)
        assert [requests.find(key).count_bytes() for key in "abc"] == [0, size, size]
        self.step(model, "a")
        assert [requests.find(key).count_bytes() for key in "abc"] == [size, 0, size]
