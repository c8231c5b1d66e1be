"""SeaCache (arXiv 2602.18993): TeaCache's rule, with a signal that is filtered before its change is measured.

Early in a request most of the signal is noise, late in it hardly any. The optimal linear denoiser of
``x = a * clean + b * noise`` says how much of each frequency is signal; the filter is its response, scaled to a mean
of 1 so that steps can be compared. Relative L1 changes of the filtered signal add up as in TeaCache, without a
polynomial in between.

Equations are the paper's (version 2). Where the authors' code (jiwoogit/SeaCache) differs, this follows the code:
frequencies are taken per axis and the gains multiplied, not radially.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .models.signals import SIGNALS, Signal
from .teacache import POLYNOMIALS, TeaCacheConfig

__all__ = ["SEA_MODELS", "SeaModel", "find_sea", "sea_filter"]

_SIGMA_MARGIN = 1e-6  # keeps a and b above 0: pipelines start at a sigma of exactly 1


def sea_filter(signal: torch.Tensor, grid: Sequence[int], sigma: float | torch.Tensor, exponent: float) -> torch.Tensor:
    """Filter a signal for the noise level it was made at.

    Per axis of the grid, with ``a = 1 - sigma``, ``b = sigma`` and a clean signal's power ``S(f) = |f|**-exponent``::

        G(f) = a * S(f) / (a**2 * S(f) + b**2)        the denoiser's response, Eq. 5
        filtered = iFFT(G(f) / mean(G) * FFT(signal))   Eq. 6, Eq. 7

    Frequencies are in cycles per token, 0 to 1/2, and the gain of several axes is the product of theirs.

    Args:
        signal: ``[B, tokens, C]``, tokens in the order of the grid, the last axis fastest.
        grid: Tokens per axis: ``(height, width)`` or ``(frames, height, width)``.
        sigma: Share of noise of a rectified flow, 0 to 1: a number, or a tensor with one element, which is not waited
            for.
        exponent: How fast a clean signal's power falls with frequency: 2 for images and 3 for videos in the paper.

    Returns:
        Like ``signal``; computed in float32.

    Raises:
        ValueError: If the signal has not as many tokens as the grid.
    """
    if signal.ndim != 3 or signal.shape[1] != math.prod(grid):
        raise ValueError(
            f"signal must be [B, {math.prod(grid)}, C] for a grid of {tuple(grid)} tokens, got {tuple(signal.shape)}"
        )
    share = torch.as_tensor(sigma, dtype=torch.float32, device=signal.device).reshape(())
    noise = share.clamp(_SIGMA_MARGIN, 1.0 - _SIGMA_MARGIN)
    axes = tuple(range(1, 1 + len(grid)))
    spectrum = torch.fft.rfftn(signal.float().unflatten(1, tuple(grid)), dim=axes)
    for axis, length in zip(axes, grid, strict=True):
        frequency = torch.fft.fftfreq(length, device=signal.device).abs()
        # Eq. 5, multiplied through by |f|**exponent, which would be divided by at frequency 0
        gain = (1.0 - noise) / ((1.0 - noise) ** 2 + noise**2 * frequency**exponent)
        # Eq. 7; the mean over all axes is the product of the axes' means. The last axis has half a spectrum.
        gain = (gain / gain.mean())[: spectrum.shape[axis]]
        spectrum *= gain.reshape([-1 if i == axis else 1 for i in range(spectrum.ndim)])
    filtered: torch.Tensor = torch.fft.irfftn(spectrum, s=tuple(grid), dim=axes)
    return filtered.flatten(1, len(grid)).to(signal.dtype)


class SeaModel(NamedTuple):
    """What the filter needs to know of a transformer class.

    Args:
        signal: The first block's modulated input, one token per cell of a grid.
        grid: From the transformer's config and the arguments of a call, by name, to the grid.
        timesteps: What the call's argument ``timestep`` is at a sigma of 1.
        exponent: For :func:`sea_filter`.
    """

    signal: Signal
    grid: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[int, ...]]
    timesteps: float
    exponent: float

    def sigma(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The noise level of a call, from its arguments by name: a tensor without dimensions, not waited for."""
        timestep: torch.Tensor = arguments["timestep"]
        return timestep.flatten()[0].float() / self.timesteps


def _grid_of_ids(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Packed images: the ids say where a token stands. Reads from the device, so once per request is enough."""
    rows, columns = (arguments["img_ids"].reshape(-1, 3)[:, 1:].amax(0) + 1).tolist()
    return int(rows), int(columns)


def _grid_of_patches(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Videos ``[B, C, frames, height, width]``."""
    patch = config["patch_size"]
    if isinstance(patch, int):
        patch = (config["patch_size_t"], patch, patch)
    return tuple(size // p for size, p in zip(arguments["hidden_states"].shape[2:], patch, strict=True))


SEA_MODELS: dict[str, SeaModel] = {
    "FluxTransformer2DModel": SeaModel(SIGNALS["FluxTransformer2DModel"], _grid_of_ids, 1.0, 2.0),
    "HunyuanVideoTransformer3DModel": SeaModel(
        SIGNALS["HunyuanVideoTransformer3DModel"], _grid_of_patches, 1000.0, 3.0
    ),
    # Not the timestep's embedding, which TeaCache measures here and which has no frequencies.
    "WanTransformer3DModel": SeaModel(
        Signal("blocks.0.attn1", argument="hidden_states"), _grid_of_patches, 1000.0, 3.0
    ),
}


def find_sea(transformer: nn.Module, config: TeaCacheConfig) -> tuple[SeaModel, tuple[float, ...]]:
    """Return what to filter on a transformer, and the coefficients: the identity, if the configuration has none.

    Raises:
        ValueError: If the class is not in ``SEA_MODELS``.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in SEA_MODELS:
            given = (1.0, 0.0) if config.coefficients is None else config.coefficients
            numbers = POLYNOMIALS[given] if isinstance(given, str) else given
            return SEA_MODELS[cls.__name__], tuple(float(coefficient) for coefficient in numbers)
    raise ValueError(
        f'metric="sea" needs to know the grid of tokens, and does for {", ".join(sorted(SEA_MODELS))}; got '
        f"{type(transformer).__name__}"
    )
