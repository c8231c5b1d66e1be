"""Dynamic mode decomposition: forecasts as sums of exponentials, fitted to evenly spaced residuals.

Linear dynamics ``r(t + 1) = A r(t)`` move along damped or oscillating exponentials, which polynomials follow for a few
steps only. ``A`` is identified from the stored residuals in the space that they span, so all that is ever needed of
them is their inner products: with ``G = V^T V`` known, everything from the singular value decomposition to the forecast
is algebra of K x K matrices in float64 on the host, and the forecast is a weighted sum ``V w`` like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .forecast import taylor_weights

__all__ = ["DMD"]

MINIMUM = 4  # residuals: one oscillation takes two modes, and those three pairs of neighbours
TOLERANCE = 1e-4  # modes below this share of the leading singular value are noise
# Inner products rounded to float32 blur squared singular values by some 2**-23 of the largest one. What lies below the
# root of twice that cannot be told from rounding, whatever the tolerance or the rank asked for.
RESOLUTION = math.sqrt(2.0**-22)


class DMD:
    """Dynamic mode decomposition (Schmid, J. Fluid Mech. 656, 2010) of the last evenly spaced residuals.

    The fit is shared by all samples of a batch. With fewer than 4 residuals at even distances, and where the fit has no
    finite result, it falls back: to TaylorSeer of order 1, and to the newest residual, in this order.

    Args:
        history: Residuals to keep.
        rank: Number of modes; 0 takes those that stand out of the noise.
        ridge: Added to the singular values that are divided by.
    """

    def __init__(self, history: int, rank: int = 0, ridge: float = 1e-8):
        self.slots = history
        self.rank = rank
        self.ridge = ridge

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        return taylor_weights(steps, step, 1)

    def window(self, steps: Sequence[int]) -> int:
        if len(steps) < MINIMUM:
            return 0
        spacing = steps[0] - steps[1]
        count = 2
        while count < len(steps) and steps[count - 1] - steps[count] == spacing:
            count += 1
        return count if count >= MINIMUM else 0

    def fit(self, steps: Sequence[int], gram: Sequence[Sequence[float]]) -> Callable[[int], list[float]]:
        newest, spacing = steps[0], steps[0] - steps[1]
        plain = [1.0] + [0.0] * (len(gram) - 1)
        modes = _modes(torch.tensor(gram, dtype=torch.float64, device="cpu").flip(0, 1), self.rank, self.ridge)
        if modes is None:
            return lambda step: plain
        eigenvalues, shares = modes

        def weights(step: int) -> list[float]:
            powers = eigenvalues ** ((step - newest) / spacing)
            result: list[float] = (shares @ powers).real.flip(0).tolist()
            return result if all(map(math.isfinite, result)) else plain

        return weights


def _modes(gram: torch.Tensor, rank: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Eigenvalues of the dynamics, and each mode's share of the newest residual as weights of the residuals.

    With residuals ``V = [v_0 .. v_m]``, oldest first, and ``X = [v_0 .. v_(m-1)]``, ``Y = [v_1 .. v_m]``:
    ``X = U S W^T`` and the projected dynamics ``U^T Y W / S``, whose eigenvectors ``E`` give the modes ``Y W / S E``;
    their amplitudes are the least-squares solution for ``v_m``. Inner products suffice, as ``U = X W / S``.

    Args:
        gram: float64 [m + 1, m + 1], ``V^T V``.
        rank: Number of modes, or 0.
        ridge: Added to the singular values that are divided by.

    Returns:
        Complex [r] and [m + 1, r], or None for a degenerate fit.
    """
    if not bool(gram.isfinite().all()) or not bool(gram.diagonal().gt(0).any()):
        return None
    try:
        squares, right = torch.linalg.eigh(gram[:-1, :-1])
        squares, right = squares.flip(0), right.flip(1)
        singular = squares.clamp(min=0).sqrt()
        threshold = RESOLUTION if rank > 0 else max(TOLERANCE, RESOLUTION)
        r = max(1, int((singular > threshold * singular[0]).sum()))
        r = min(r, rank) if rank > 0 else r
        singular, right = singular[:r], right[:, :r]
        divided = right / (singular + ridge)
        dynamics = (right / singular).mT @ gram[:-1, 1:] @ divided
        eigenvalues, vectors = torch.linalg.eig(dynamics)
        modes = torch.cat([divided.new_zeros(1, r), divided]).to(vectors.dtype) @ vectors  # of V; v_0 has no part
        # |V a - v_m| = |root a - root e_m| for any root^T root = V^T V.
        scales, basis = torch.linalg.eigh(gram)
        root = (basis * scales.clamp(min=0).sqrt()).mT.to(modes.dtype)
        amplitudes = torch.linalg.lstsq(root @ modes, root[:, -1:], driver="gelsd").solution
    except RuntimeError:  # no convergence
        return None
    shares = modes * amplitudes.mT
    return (eigenvalues, shares) if bool(torch.view_as_real(shares).isfinite().all()) else None
