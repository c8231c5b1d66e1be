"""Configuration of calibrators: how a reused step is forecast from stored residuals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .config import _check_bool, _check_choice, _check_int, _check_real, _Config

__all__ = [
    "CalibratorConfig",
    "DMDCalibratorConfig",
    "FoCaCalibratorConfig",
    "HermiteCalibratorConfig",
    "TaylorSeerCalibratorConfig",
]


@dataclasses.dataclass
class CalibratorConfig(_Config):
    """How reused steps are forecast from stored residuals; the base class forecasts nothing (plain reuse).

    Args:
        enable_calibrator: Forecast the hidden_states stream.
        enable_encoder_calibrator: Forecast the encoder_hidden_states stream.
        calibrator_type: Name of the forecaster.
        calibrator_cache_type: ``"residual"`` stores what the body adds to its input, ``"hidden_states"`` its output.
        calibrator_kwargs: Further options of the forecaster.
    """

    enable_calibrator: bool = False
    enable_encoder_calibrator: bool = False
    calibrator_type: str = "taylorseer"
    calibrator_cache_type: str = "residual"
    calibrator_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Check types and ranges of every field."""
        name, own = type(self).__name__, type(self).calibrator_type
        if self.calibrator_type != own:  # each type has a class of its own
            raise ValueError(f"calibrator_type must be {own!r} in a {name}, got {self.calibrator_type!r}")
        for field in ("enable_calibrator", "enable_encoder_calibrator"):
            _check_bool(field, getattr(self, field))
            if type(self) is CalibratorConfig and getattr(self, field):
                raise ValueError(f"{field}: a {name} forecasts nothing; take another, as TaylorSeerCalibratorConfig")
        _check_choice("calibrator_cache_type", self.calibrator_cache_type, ("residual", "hidden_states"))

    def strify(self, **kwargs: Any) -> str:
        """Return a short tag of the settings."""
        return "NONE"


@dataclasses.dataclass
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """Forecast by Taylor expansion over the computed steps (TaylorSeer, arXiv 2503.06923).

    Args:
        taylorseer_order: Order of the expansion, 1 to 4. Order n keeps n + 1 residuals per stream.
    """

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    taylorseer_order: int = 1

    def validate(self) -> None:
        """Check types and ranges of every field."""
        super().validate()
        _check_int("taylorseer_order", self.taylorseer_order, 1, 4)

    def strify(self, **kwargs: Any) -> str:
        """Return a short tag of the settings; ``details=True`` spells it out."""
        return f"TaylorSeer_O({self.taylorseer_order})" if kwargs.get("details") else f"T1O{self.taylorseer_order}"


@dataclasses.dataclass
class FoCaCalibratorConfig(CalibratorConfig):
    """Forecast as FoCa does: a trapezoidal rule from the last computed step, averaging two slopes (arXiv 2508.16211).

    It has no settings of its own. It keeps 4 residuals per stream.
    """

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_type: str = "foca"

    def strify(self, **kwargs: Any) -> str:
        """Return a short tag of the settings."""
        return "FoCa"


@dataclasses.dataclass
class HermiteCalibratorConfig(CalibratorConfig):
    """Forecast from TaylorSeer's derivatives in the scaled Hermite basis (HiCache, arXiv 2508.16984).

    Args:
        hermite_order: Highest derivative, 1 to 4. Order n keeps n + 1 residuals per stream.
        hermite_sigma: Scale of the basis, above 0 and at most 1; the smaller it is, the more derivatives are damped. At
            order 1 the forecast is a straight line with ``2 * hermite_sigma**2`` times the slope of TaylorSeer's.
    """

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_type: str = "hermite"
    hermite_order: int = 2
    hermite_sigma: float = 0.5

    def validate(self) -> None:
        """Check types and ranges of every field."""
        super().validate()
        _check_int("hermite_order", self.hermite_order, 1, 4)
        _check_real("hermite_sigma", self.hermite_sigma)
        if not 0.0 < self.hermite_sigma <= 1.0:
            raise ValueError(f"hermite_sigma must be above 0 and at most 1, got {self.hermite_sigma}")

    def strify(self, **kwargs: Any) -> str:
        """Return a short tag of the settings; ``details=True`` spells it out."""
        order, sigma = self.hermite_order, self.hermite_sigma
        return f"Hermite_O({order}, {sigma})" if kwargs.get("details") else f"HO{order}S{sigma}"


@dataclasses.dataclass
class DMDCalibratorConfig(CalibratorConfig):
    """Forecast by dynamic mode decomposition: a sum of exponentials, fitted to evenly spaced computed steps.

    It takes at least 4 computed steps at even distances; before that, and where distances differ, it forecasts as
    TaylorSeer of order 1 does. Each fit reads a few inner products back from the device, and serves all samples of a
    batch.

    Args:
        dmd_history: Residuals to keep per stream, at least 4. The dynamics drift from step to step, so 5 or 6 do better
            than more.
        dmd_rank: Number of modes. 0 takes those above 1e-4 of the leading singular value, as far as inner products
            in float32 tell them from rounding (about 5e-4).
        dmd_ridge: Added to the singular values that are divided by.
        dmd_svd_precision: ``"low"``, ``"medium"`` or ``"high"``. Accepted for compatibility and without effect: modes
            come from the inner products in float64, there is no decomposition on the device whose precision to choose.
    """

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_type: str = "dmd"
    dmd_history: int = 6
    dmd_rank: int = 0
    dmd_ridge: float = 1e-8
    dmd_svd_precision: str = "medium"

    def validate(self) -> None:
        """Check types and ranges of every field."""
        super().validate()
        _check_int("dmd_history", self.dmd_history, 4, 16)
        _check_int("dmd_rank", self.dmd_rank, 0)
        _check_real("dmd_ridge", self.dmd_ridge)
        if not 0.0 <= self.dmd_ridge < math.inf:
            raise ValueError(f"dmd_ridge must be at least 0 and finite, got {self.dmd_ridge}")
        _check_choice("dmd_svd_precision", self.dmd_svd_precision, ("low", "medium", "high"))

    def strify(self, **kwargs: Any) -> str:
        """Return a short tag of the settings; ``details=True`` spells it out."""
        if kwargs.get("details"):
            return f"DMD_H({self.dmd_history}, {self.dmd_svd_precision})"
        precision = "" if self.dmd_svd_precision == "medium" else self.dmd_svd_precision[0]
        return f"DMDH{self.dmd_history}{precision}"
