"""What a plan for splitting a model's sequences is made of. It reads like diffusers' ``_cp_plan``, and can say more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["ContextPlan", "In", "Out", "Tokens"]


@dataclass(frozen=True)
class In:
    """A tensor that is split, as an input of a module or as its output (``ContextParallelInput`` has these fields).

    Lists, tuples and dicts of tensors are split item by item; what is no tensor is left as it is.

    Args:
        split_dim: Where its tokens are.
        expected_dims: Tensors with another number of dimensions are left as they are.
        split_output: Diffusers' word for outputs; the place in a plan says it already.
        stream: Whether attention runs over it. By default it does if it is an input of features,
            [batch, tokens, channels].
        joined: It goes with the sequences that the plan says are joined, one after the other.
        valid: It is a mask [batch, tokens], and attention leaves out the tokens that it excludes.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    stream: bool | None = None
    joined: bool = False
    valid: bool = False


@dataclass(frozen=True)
class Out:
    """A tensor that is gathered, as a module's output or on its way in (see ``ContextParallelOutput``).

    Args:
        gather_dim: Where its tokens are.
        expected_dims: As in ``In``.
        joined: It is made of the sequences that the plan says are joined; they are gathered one after the other.
    """

    gather_dim: int
    expected_dims: int | None = None
    joined: bool = False


@dataclass(frozen=True)
class Tokens:
    """A parameter that is a number of tokens, the first ones of a stream: the module gets how many of them are here.

    Args:
        stream: Which: the key in the plan where it is split, a dot, and the parameter's name or output's index.
        last: They are the last ones.
    """

    stream: str
    last: bool = False


class ContextPlan(NamedTuple):
    """How one transformer class is split.

    Args:
        plan: By module name (``*`` is every child): by the name of a parameter or the index of an output, an entry.
            In place of such a dict, one ``Out`` for the first output, or a list for several.
        attention: Which modules attend over the pieces: beginnings of their names, ``*`` for one part of a name.
            Empty: all that lie where sequences are split.
        joined: Streams that attention runs over as one sequence, in their order there, where that matters: since
            there are masks over all of them, or they are gathered together. Named as in ``Tokens``.
    """

    plan: dict[str, Any]
    attention: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
