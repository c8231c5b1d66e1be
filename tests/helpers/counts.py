"""What is counted: operators that are called, bytes that tensors hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = ("_c10d_functional", "c10d")
BOOKKEEPING = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")  # with every collective


class Operators(TorchDispatchMode):
    """Counts the calls of some namespaces' operators by name, inside of operators on DTensors as well."""

    def __init__(self, *namespaces: str) -> None:
        super().__init__()
        self.namespaces = namespaces
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again with local tensors
        name = func._schema.name
        if func.namespace in self.namespaces and name not in BOOKKEEPING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """By this rank."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.untyped_storage().nbytes() for tensor in local)
