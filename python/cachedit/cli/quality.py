"""How close pictures are to those of the baseline."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


class Quality(NamedTuple):
    """Mean and minimum over the pictures of their PSNR in dB (infinite where equal), and the mean SSIM."""

    psnr_db: float
    psnr_db_min: float
    ssim: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None where the pictures are the same."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def compare(images: torch.Tensor, baseline: torch.Tensor) -> Quality:
    """Compare pictures [B, 3, H, W] in 0 to 1 one by one."""
    decibels = [peak_signal_noise_ratio(a, b, data_range=1.0).item() for a, b in zip(images, baseline, strict=True)]
    ssim = structural_similarity_index_measure(images, baseline, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)
    return Quality(sum(decibels) / len(decibels), min(decibels), ssim.item())
