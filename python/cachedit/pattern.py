"""Forward patterns: which streams a block takes and returns, and in what order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn

__all__ = ["BlockSignature", "ForwardPattern", "check_object", "check_outputs", "check_shapes", "fits"]

H, E = "hidden_states", "encoder_hidden_states"


class ForwardPattern(Enum):
    """Contract of a block list: inputs -> outputs.

    ========= ================= =================
    pattern   takes             returns
    ========= ================= =================
    Pattern_0 hidden, encoder   (hidden, encoder)
    Pattern_1 hidden, encoder   (encoder, hidden)
    Pattern_2 hidden, encoder   hidden
    Pattern_3 hidden            hidden
    Pattern_4 hidden            (hidden, encoder)
    Pattern_5 hidden            (encoder, hidden)
    ========= ================= =================

    In the place of the encoder stream blocks may return None, or an object that is no tensor (a key-value cache), if
    all return the same one: a reused step hands it on.
    """

    Pattern_0 = ((H, E), (H, E))
    Pattern_1 = ((H, E), (E, H))
    Pattern_2 = ((H, E), (H,))
    Pattern_3 = ((H,), (H,))
    Pattern_4 = ((H,), (H, E))
    Pattern_5 = ((H,), (E, H))

    def __init__(self, takes: tuple[str, ...], returns: tuple[str, ...]):
        self.In = takes
        self.Out = returns
        self.Return_H_First = returns[0] == H
        self.Return_H_Only = returns == (H,)
        self.Forward_H_only = takes == (H,)
        self.Supported = True

    @staticmethod
    def supported_patterns() -> list[ForwardPattern]:
        """Return all patterns."""
        return list(ForwardPattern)

    def pack(self, hidden: torch.Tensor, encoder: Any) -> Any:
        """Put the two streams in the form that a block of this pattern returns."""
        if self.Return_H_Only:
            return hidden
        return (hidden, encoder) if self.Return_H_First else (encoder, hidden)

    def unpack(self, block: nn.Module, output: Any) -> tuple[torch.Tensor, Any]:
        """Take a block's output apart, into the hidden stream and what is in the place of the encoder stream.

        Raises:
            TypeError: If the output does not have this pattern's form; names the block and the patterns that have it.
        """
        if self.Return_H_Only:
            if isinstance(output, torch.Tensor):
                return output, None
        elif isinstance(output, (tuple, list)) and len(output) == 2:
            hidden, encoder = output if self.Return_H_First else (output[1], output[0])
            if isinstance(hidden, torch.Tensor):
                return hidden, encoder
        fitting = _suggest(_streams_of(block) or self.In, _count_outputs(output))
        raise TypeError(
            f"forward_pattern: {self.name} says that {describe_block(block)} returns {_describe_streams(self.Out)}, "
            f"but it returned {_describe_output(output)}; {fitting}"
        )


class BlockSignature:
    """Finds a pattern's streams among the arguments of a call, positional or by keyword.

    Args:
        block: A block of the list.
        pattern: The list's pattern.
        check: Require that the parameters have the streams' names. Without the check, streams are taken by position
            where the names are missing.
        names: What the block calls hidden_states and encoder_hidden_states.

    Raises:
        ValueError: If the check fails; names the block's class, its signature and the patterns that would match.
    """

    def __init__(self, block: nn.Module, pattern: ForwardPattern, check: bool = True, names: tuple[str, str] = (H, E)):
        parameters = _forward_parameters(block)
        if check:
            _check_signature(block, pattern, parameters, names)
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.pattern = pattern
        self.hidden_name, self.hidden_index = _locate(names[0], 0, positional)
        self.encoder_name, self.encoder_index = _locate(names[1], 1, positional)

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden_states tensor of a call."""
        if self.hidden_index < len(args):
            return args[self.hidden_index]
        return kwargs[self.hidden_name]

    def encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The encoder_hidden_states tensor of a call, or None where the pattern has none or it was not given."""
        if self.pattern.Forward_H_only:
            return None
        if self.encoder_index < len(args):
            return args[self.encoder_index]
        return kwargs.get(self.encoder_name)

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor, encoder: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with other streams; an encoder that is no tensor stays as it is."""
        given = {self.hidden_name: (self.hidden_index, hidden)}
        if isinstance(encoder, torch.Tensor) and not self.pattern.Forward_H_only:
            given[self.encoder_name] = self.encoder_index, encoder
        for name, (index, stream) in given.items():
            if index < len(args):
                args = (*args[:index], stream, *args[index + 1 :])
            else:
                kwargs = {**kwargs, name: stream}
        return args, kwargs


def check_outputs(block: nn.Module, pattern: ForwardPattern) -> None:
    """Raise a ValueError if a block's ``forward`` is annotated as returning another number of tensors.

    Asked for by ``check_num_outputs`` only, because some blocks of diffusers are annotated wrongly.
    """
    outputs = _annotated_outputs(block)
    if outputs not in (None, len(pattern.Out)):
        raise ValueError(
            f"forward_pattern: {pattern.name} returns {_describe_streams(pattern.Out)}, but "
            f"{describe_block(block)} is annotated otherwise; {_suggest(_streams_of(block), outputs)}"
        )


def fits(block: nn.Module, pattern: ForwardPattern, outputs: bool) -> bool:
    """Whether a block's parameters and, with ``outputs``, its return annotation go with a pattern."""
    annotated = _annotated_outputs(block) if outputs else None
    return set(pattern.In) <= set(_streams_of(block)) and annotated in (None, len(pattern.Out))


def check_object(block: nn.Module, found: Any, known: Any) -> None:
    """Raise a TypeError if a block returned another object than the one that a reused step would hand on."""
    if found is not known:
        raise TypeError(
            f"forward_pattern: in the place of encoder_hidden_states {describe_block(block)} returned a "
            f"{type(found).__name__} that is not the {type(known).__name__} of the blocks before it; a skipped block "
            "can only hand on what it was given"
        )


def check_shapes(block: nn.Module, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """Raise a TypeError if the streams that ``block`` returned are laid out otherwise than those before."""
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in inputs]:
        raise TypeError(
            f"forward_pattern: the streams (hidden_states, encoder_hidden_states) have shapes {_shapes(inputs)}, "
            f"but {describe_block(block)} returned {_shapes(outputs)}; "
            "is the order of its outputs another (Pattern_0 or Pattern_1, Pattern_4 or Pattern_5)?"
        )


def describe_block(block: nn.Module) -> str:
    """``ClassName.forward(signature)``, for messages."""
    try:
        return f"{type(block).__name__}.forward{inspect.signature(block.forward)}"
    except (TypeError, ValueError):
        return f"{type(block).__name__}.forward(...)"


def _forward_parameters(block: nn.Module) -> list[inspect.Parameter]:
    forward: Callable[..., Any] = block.forward
    return list(inspect.signature(forward).parameters.values())


def _streams_of(block: nn.Module, names: tuple[str, str] = (H, E)) -> tuple[str, ...]:
    present = {p.name for p in _forward_parameters(block)}
    return tuple(stream for stream, name in zip((H, E), names, strict=True) if name in present)


def _locate(name: str, default_index: int, names: list[str]) -> tuple[str, int]:
    if name in names:
        return name, names.index(name)
    return (names[default_index] if default_index < len(names) else name), default_index


def _check_signature(
    block: nn.Module, pattern: ForwardPattern, parameters: list[inspect.Parameter], names: tuple[str, str]
) -> None:
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return  # a wrapper: nothing to read off
    present = _streams_of(block, names)
    given = dict(zip((H, E), names, strict=True))
    missing = [given[stream] for stream in pattern.In if stream not in present]
    if missing:
        hint = (
            _suggest(present, _annotated_outputs(block))
            if present
            else ("rename the parameters, or pass check_forward_pattern=False to take the streams by position")
        )
        raise ValueError(
            f"forward_pattern: {pattern.name} takes {_describe_streams(pattern.In)}, but "
            f"{describe_block(block)} has no parameter {missing[0]!r}; {hint}"
        )


def _annotated_outputs(block: nn.Module) -> int | None:
    """Tensors returned according to the annotation of ``forward``, or None where it does not say clearly."""
    annotation = inspect.signature(block.forward).return_annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if not isinstance(annotation, (str, type)):
        text = str(annotation)
    text = text.replace("torch.", "").replace("typing.", "").replace(" ", "").lower()
    if text == "tensor":
        return 1
    return 2 if text in ("tuple[tensor,tensor]", "tuple[tensor,tensor|none]", "tuple[tensor|none,tensor]") else None


def _count_outputs(output: Any) -> int | None:
    if isinstance(output, torch.Tensor):
        return 1
    return len(output) if isinstance(output, (tuple, list)) else None


def _suggest(takes: tuple[str, ...], outputs: int | None) -> str:
    fitting = [p.name for p in ForwardPattern if set(p.In) <= set(takes) and (outputs in (None, len(p.Out)))]
    # A block that takes both streams is better described by a pattern that says so.
    fitting = [name for name in fitting if ForwardPattern[name].In == takes] or fitting
    return f"patterns that match: {', '.join(fitting)}" if fitting else "no pattern matches"


def _describe_streams(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"({', '.join(names)})"


def _describe_output(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)} ({', '.join(type(item).__name__ for item in output)})"
    return f"{type(output).__name__}"


def _shapes(tensors: list[torch.Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
