"""Backends for ``ForwardGraphs`` that need no GPU: what is captured is run again, with other contents of the same."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from native import NVCC, build, cuda_headers


def load_cudart(library: Path) -> ctypes.CDLL:
    """csrc/cuda/graphs.cpp on the host, with tests/native/cudart.cpp for a CUDA runtime."""
    if NVCC is None:
        pytest.skip("needs the headers that come with nvcc")
    build(library, "tests/native/cudart.cpp", "csrc/cuda/graphs.cpp", includes=(cuda_headers(),))
    return ctypes.CDLL(str(library))


class Replays:
    """Forwards whose decision is known; none is decided in a graph."""

    def __init__(self) -> None:
        self.captures = 0

    def refuses(self, device: torch.device) -> str | None:
        return None

    def refuses_decisions(self) -> str | None:
        return "the host decides here"

    def capture(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Callable[[], None]]:
        self.captures += 1
        output = pytree.tree_map(torch.clone, run())

        def replay() -> None:
            for place, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(run())):
                place.copy_(new)

        return output, replay


class Composes(Replays):
    """Steps that csrc/cuda/graphs.cpp composes, and csrc/policy.h decides."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.make = library.fake_callback_graph
        self.make.restype = ctypes.c_void_p
        self.pieces = 0
        self.errors: list[BaseException] = []
        self.kept: list[Any] = []

    def refuses_decisions(self) -> str | None:
        return None

    def piece(self, run: Callable[[], Any], pool: Hashable) -> tuple[Any, Any]:
        self.pieces += 1
        result = run()
        mode = torch.is_inference_mode_enabled()

        def replay() -> None:
            try:
                with torch.inference_mode(mode), torch.no_grad():
                    for place, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(run())):
                        if isinstance(place, torch.Tensor):
                            place.copy_(new)
            except BaseException as error:  # through C nothing is raised
                self.errors.append(error)

        callback = ctypes.CFUNCTYPE(None)(replay)
        self.kept.append(callback)
        handle = self.make(callback)
        return result, type("Captured", (), {"raw_cuda_graph": lambda self: handle})()
