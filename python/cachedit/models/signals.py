"""What TeaCache measures: per transformer class, the module to tap, and the published polynomials that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..teacache import POLYNOMIALS, TeaCacheConfig

__all__ = ["FITS", "SIGNALS", "Fit", "Signal", "find_signal"]

Row = TypeVar("Row")


class Signal(NamedTuple):
    """Where a forward hook finds the signal: in what a module returns, or in what it is given.

    Args:
        module: Dotted path of the module within the transformer.
        output: Index into what it returns, where that is a tuple.
        argument: The signal is what the module is given instead: its first argument, by this name if by keyword.
    """

    module: str
    output: int | None = None
    argument: str | None = None

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> torch.Tensor:
        """Pick the signal in a forward hook, registered ``with_kwargs=True``, on :attr:`module`."""
        if self.argument is not None:
            found = kwargs[self.argument] if self.argument in kwargs else args[0]
        else:
            found = output if self.output is None else output[self.output]
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"{self} found a {type(found).__name__}, not a tensor")
        return found


class Fit(NamedTuple):
    """A published polynomial that belongs to a class.

    Args:
        polynomial: Key of ``POLYNOMIALS``.
        config: Values of the transformer's config by which its checkpoints are known; it is then the default for them.
            None: only on request, because the config does not tell these checkpoints from others.
        signal: What it was fitted to, where that is not the class's row in ``SIGNALS``.
    """

    polynomial: str
    config: Mapping[str, Any] | None
    signal: Signal | None = None


# The block's first norm modulates what it has normalised, and returns it as the first of several.
_NORM = Signal("transformer_blocks.0.norm1", output=0)
# The block modulates by itself; its attention is the first to get the result.
_ATTENTION = Signal("transformer_blocks.0.attn", argument="hidden_states")
# The embedding of the timestep (and of ofs, if there is one), which all blocks are modulated by.
_COGVIDEOX = Signal("transformer_blocks.0.norm1.silu", argument="input")
_WAN = Signal("condition_embedder.time_embedder")
_WAN_PROJECTION = Signal("condition_embedder.time_proj")

SIGNALS: dict[str, Signal] = {
    "ChromaTransformer2DModel": _NORM,
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "CogView4Transformer2DModel": _NORM,
    "ConsisIDTransformer3DModel": _COGVIDEOX,
    "Flux2Transformer2DModel": _ATTENTION,
    "FluxTransformer2DModel": _NORM,
    "HiDreamImageTransformer2DModel": Signal("t_embedder"),
    "HunyuanVideoTransformer3DModel": _NORM,
    "LTXVideoTransformer3DModel": Signal("transformer_blocks.0.attn1", argument="hidden_states"),
    "Lumina2Transformer2DModel": Signal("layers.0.norm1", output=0),
    "MochiTransformer3DModel": _NORM,
    "QwenImageTransformer2DModel": _ATTENTION,
    "SD3Transformer2DModel": _NORM,
    "WanTransformer3DModel": _WAN,
    "ZImageTransformer2DModel": Signal("layers.0.attention", argument="hidden_states"),
}

_T2V_1_3B = {"num_layers": 30, "in_channels": 16}
_T2V_14B = {"num_layers": 40, "in_channels": 16}
_I2V_14B = {"num_layers": 40, "in_channels": 36, "image_dim": 1280}

FITS: dict[str, tuple[Fit, ...]] = {
    "CogVideoXTransformer3DModel": (
        Fit("cogvideox-2b", {"use_rotary_positional_embeddings": False}),
        Fit("cogvideox-5b", {"use_rotary_positional_embeddings": True, "patch_size_t": None}),
        Fit("cogvideox1.5-5b", {"patch_size_t": 2, "in_channels": 16}),
        Fit("cogvideox1.5-5b-i2v", {"patch_size_t": 2, "in_channels": 32}),
    ),
    "ConsisIDTransformer3DModel": (Fit("cogvideox-5b", {}),),
    "FluxTransformer2DModel": (Fit("flux", {}), Fit("flux-kontext", None)),
    "HiDreamImageTransformer2DModel": (Fit("hidream-i1-full", None),),
    "HunyuanVideoTransformer3DModel": (Fit("hunyuan-video", {"image_condition_type": None}),),
    "LTXVideoTransformer3DModel": (Fit("ltx-video", {}),),
    "Lumina2Transformer2DModel": (Fit("lumina2", {}), Fit("lumina2-v2", None)),
    "MochiTransformer3DModel": (Fit("mochi", {}),),
    "QwenImageTransformer2DModel": (Fit("qwen-image", {}),),
    "WanTransformer3DModel": (
        Fit("wan2.1-t2v-1.3b", _T2V_1_3B),
        Fit("wan2.1-t2v-14b", _T2V_14B),
        # These two have one config: whoever wants them has to say which.
        Fit("wan2.1-i2v-480p", _I2V_14B),
        Fit("wan2.1-i2v-720p", _I2V_14B),
        Fit("wan2.1-t2v-1.3b-ret", None, _WAN_PROJECTION),
        Fit("wan2.1-t2v-14b-ret", None, _WAN_PROJECTION),
        Fit("wan2.1-i2v-480p-ret", None, _WAN_PROJECTION),
        Fit("wan2.1-i2v-720p-ret", None, _WAN_PROJECTION),
    ),
}


def find_signal(transformer: nn.Module, config: TeaCacheConfig) -> tuple[Signal, tuple[float, ...]]:
    """Return what to measure on a transformer, and the coefficients for it.

    Raises:
        ValueError: If the class is not in ``SIGNALS``; if the module is not there; or if the configuration has no
            coefficients, and the model not exactly one published polynomial.
    """
    name = type(transformer).__name__
    signal = _row(SIGNALS, transformer)
    if signal is None:
        raise ValueError(
            f"TeaCache does not know what to measure on {name}: add a row to cachedit.models.signals.SIGNALS; "
            f"it has {', '.join(sorted(SIGNALS))}"
        )
    fits = _row(FITS, transformer) or ()
    given = config.coefficients
    if given is None:
        given = _default(transformer, fits)
    if isinstance(given, str):
        own = {fit.polynomial: fit.signal for fit in fits}
        signal, given = own.get(given) or signal, POLYNOMIALS[given]
    try:
        transformer.get_submodule(signal.module)
    except AttributeError:
        raise ValueError(f"TeaCache taps {signal.module!r} of {name}, but this one has no such module") from None
    return signal, tuple(float(coefficient) for coefficient in given)


def _default(transformer: nn.Module, fits: tuple[Fit, ...]) -> str:
    """The published polynomial of a model."""
    config = getattr(transformer, "config", {})
    known = [
        fit.polynomial
        for fit in fits
        if fit.config is not None and all(config.get(key) == value for key, value in fit.config.items())
    ]
    if len(known) == 1:
        return known[0]
    name = type(transformer).__name__
    if known:
        raise ValueError(f"coefficients: {name} with this config may be one of several models; give {_options(known)}")
    if fits:
        options = _options([fit.polynomial for fit in fits])
        raise ValueError(f"coefficients: none are the default for {name} with this config; give numbers, or {options}")
    raise ValueError(
        f"coefficients: none are published for {name}; give numbers (cachedit.teacache.fit_coefficients fits them). "
        f"Classes with published ones: {', '.join(sorted(FITS))}"
    )


def _options(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)


def _row(table: Mapping[str, Row], transformer: nn.Module) -> Row | None:
    """The row of a transformer's class, or of the nearest base class that has one."""
    return next((table[cls.__name__] for cls in type(transformer).__mro__ if cls.__name__ in table), None)
