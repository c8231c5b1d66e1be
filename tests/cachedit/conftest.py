"""CUDA graphs without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from cachedit_kernels import graphs as step_graphs
from captures import Composes, load_cudart


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_cudart(tmp_path_factory.mktemp("cudart") / "graphs.so")


@pytest.fixture
def backend(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Composes]:
    functions = step_graphs.bind(library)
    monkeypatch.setattr(step_graphs, "_functions", lambda: functions)
    backend = Composes(library)
    yield backend
    assert not backend.errors
