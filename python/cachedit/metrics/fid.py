"""FID (arXiv 1706.08500): torchmetrics' distance over the features of the Inception network it is defined with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..platforms import current_platform
from .sources import Media, Pair, matched_files, read_pairs
from .weights import broken_weights, find_weights

__all__ = ["FidDistribution", "FrechetInceptionDistance"]

FILE = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"


class _Features(nn.Module):
    """Inception as TorchScript: uint8 [B, 3, H, W] of any size to float32 [B, 2048]."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.network, self.device = _network(find_weights("FID", FILE, URL), device), device

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(pictures.to(self.device), return_features=True)
        return features.cpu()


@functools.cache
def _network(path: Path, device: str) -> Any:
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:  # another file, or a part of one
        raise broken_weights("FID", path, URL, error) from error


class FidDistribution:
    """The features of all pictures on both sides."""

    def __init__(self, batch_size: int = 1, device: str | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        from torchmetrics.image.fid import FrechetInceptionDistance as Distance

        self.distance = Distance(feature=_Features(device or current_platform.device_type))
        self.batch_size, self.pairs, self.count = batch_size, list[Pair](), 0

    def add(self, pair: Pair) -> None:
        """Take one pair; pictures of one size go through the network together."""
        if self.pairs and pair.true.shape != self.pairs[0].true.shape:
            self._flush()
        self.pairs.append(pair)
        self.count += 1
        if len(self.pairs) >= self.batch_size:
            self._flush()

    def value(self) -> float:
        """The distance. ValueError for fewer than two pairs."""
        if self.count < 2:
            raise ValueError(f"FID needs at least two pictures on each side, got {self.count}")
        self._flush()
        return float(self.distance.compute())

    def _flush(self) -> None:
        if self.pairs:
            self.distance.update(torch.stack([pair.true for pair in self.pairs]), real=True)
            self.distance.update(torch.stack([pair.test for pair in self.pairs]), real=False)
            self.pairs = []


class FrechetInceptionDistance:
    """FID as an object, as ``cache_dit.metrics`` has it.

    Args:
        device: Where the network runs. Default: the accelerator, if there is one.
        dims: Features per picture; 2048 only.
        num_workers, disable_tqdm: Without effect.
        batch_size: Pictures that go through the network at a time.
    """

    def __init__(
        self,
        device: str | None = None,
        dims: int = 2048,
        num_workers: int = 1,
        batch_size: int = 1,
        disable_tqdm: bool = True,
    ) -> None:
        if dims != 2048:
            raise ValueError(f"dims must be 2048, got {dims}")
        self.device, self.batch_size = device, batch_size

    def compute_fid(self, image_true: Media, image_test: Media) -> tuple[float, int]:
        """As :func:`cachedit.metrics.compute_fid`."""
        distribution = FidDistribution(self.batch_size, self.device)
        for file in matched_files(image_true, image_test):
            for pair in read_pairs(*file):
                distribution.add(pair)
        return distribution.value(), distribution.count

    compute_video_fid = compute_fid
