import pytest
import torch

import cachedit
from cachedit import ParallelismBackend, ParallelismConfig
from cachedit.parallel.config import Sizes


@pytest.mark.parametrize(
    "given, world, sizes",
    [
        ({"ulysses_size": 4}, 4, Sizes(1, 4, 1)),
        ({"ulysses_size": "auto"}, 3, Sizes(1, 3, 1)),
        ({"ulysses_size": "auto", "ring_size": 2}, 8, Sizes(2, 4, 1)),
        ({"ring_size": "auto", "tp_size": 2, "ulysses_size": 2}, 8, Sizes(2, 2, 2)),
        ({"tp_size": 2}, 2, Sizes(1, 1, 2)),
    ],
)
def test_sizes(given, world, sizes):
    config = ParallelismConfig(**given)
    config.validate()
    assert config.sizes(world) == sizes and sizes.total == world


@pytest.mark.parametrize(
    "given, world, message",
    [
        ({"ulysses_size": 4}, 2, r"ulysses_size x ring_size x tp_size = 4 x 1 x 1 must be the number of ranks, 2"),
        ({"ulysses_size": 2}, 4, "= 2 x 1 x 1 must be the number of ranks, 4"),
        ({"ulysses_size": "auto", "tp_size": 3}, 4, "= 1 x 1 x 3 must be the number of ranks, 4"),
        ({"ulysses_size": "auto"}, 1, "nothing to share out on one rank"),
        ({}, 2, "= 1 x 1 x 1 must be the number of ranks, 2"),
    ],
)
def test_sizes_that_do_not_fit(given, world, message):
    with pytest.raises(ValueError, match=message):
        ParallelismConfig(**given).sizes(world)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"ulysses_size": 0}, ValueError, 'ulysses_size must be an integer of at least 1 or "auto", got 0'),
        ({"tp_size": True}, ValueError, "tp_size must be an integer of at least 1"),
        ({"ring_size": "all"}, ValueError, "ring_size must be .* got 'all'"),
        ({"ring_size": "auto", "tp_size": "auto"}, ValueError, "at most one of .* may be"),
        ({"ulysses_float8": 1}, TypeError, "ulysses_float8 must be True or False, got 1"),
        ({"ring_rotate_method": "alltoall"}, ValueError, "ring_rotate_method must be one of p2p, allgather"),
        ({"backend": "nccl"}, ValueError, "backend must be one of Auto, CACHE_DIT"),
        ({"use_ray": True}, ValueError, "use_ray must be False"),
        ({"extra_parallel_modules": "vae"}, TypeError, "extra_parallel_modules must be a list"),
        ({"extra_parallel_modules": [1]}, TypeError, "must be names or modules, got int"),
    ],
)
def test_values_that_are_wrong(given, error, message):
    with pytest.raises(error, match=message):
        ParallelismConfig(**given).validate()


def test_older_names(caplog):
    config = ParallelismConfig(parallel_kwargs={"experimental_ulysses_float8": True, "attention_backend": "flash"})
    assert config == ParallelismConfig(ulysses_float8=True, attention_backend="flash")
    assert "use ParallelismConfig(ulysses_float8=...)" in caplog.text
    with pytest.raises(ValueError, match="parallel_kwargs: ulysess is none of"):
        ParallelismConfig(parallel_kwargs={"ulysess": 2})


def test_what_it_says_of_itself():
    config = ParallelismConfig(ulysses_size=2, tp_size=2, ulysses_float8=True)
    assert config.strify() == "Ulysses2_F8_TP2"
    assert config.strify(details=True) == "ParallelismConfig(ulysses_size=2, tp_size=2, ulysses_float8=True)"
    assert config.enabled() and config.hybrid_enabled() and not config.usp_enabled()
    assert not ParallelismConfig(ulysses_size=1).enabled()
    assert config.update(ring_size=2, tp_size=None).as_dict()["ring_size"] == 2
    with pytest.raises(TypeError, match="has no field 'ring'"):
        config.update(ring=2)
    assert ParallelismConfig(backend="cache_dit").validate() is None
    assert ParallelismBackend("Auto") is ParallelismBackend.AUTO


def test_without_a_process_group():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised; launch with torchrun"):
        cachedit.enable_cache(model, parallelism_config=ParallelismConfig(ulysses_size=2))
    with pytest.raises(TypeError, match="parallelism_config must be a ParallelismConfig, got dict"):
        cachedit.enable_cache(model, parallelism_config={"ulysses_size": 2})
