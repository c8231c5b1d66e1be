"""LPIPS (arXiv 1801.03924) on AlexNet: torchmetrics' trained weights of the channels, without torchvision."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..platforms import current_platform
from .weights import broken_weights, find_weights

__all__ = ["Lpips", "load_lpips"]

FILE = "alexnet-owt-7be5be79.pth"
URL = f"https://download.pytorch.org/models/{FILE}"


class Lpips(nn.Module):
    """Distance of two pictures: their AlexNet features, normalised per pixel, squared difference, weighted channels."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(  # the names of the convolutions in the file: features.0, 3, 6, 8, 10
            [
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            ]
        )
        self.channels = nn.ParameterList([torch.ones(1, width, 1, 1) for width in (64, 192, 384, 256, 256)])
        # ImageNet's mean and deviation, for values from -1 to 1
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def load(self, alexnet: Path, channels: Path) -> Lpips:
        """Read torchvision's AlexNet and the channels' weights of ``lpips`` (in torchmetrics' package)."""
        features = torch.load(alexnet, map_location="cpu", weights_only=True)
        weights = torch.load(channels, map_location="cpu", weights_only=True)
        for number, (place, layer) in enumerate(zip((0, 3, 6, 8, 10), self.layers, strict=True)):
            layer.load_state_dict({name: features[f"features.{place}.{name}"] for name in ("weight", "bias")})
            self.channels[number].data.copy_(weights[f"lin{number}.model.1.weight"])
        return self

    @torch.no_grad()
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances [B] of pictures [B, 3, H, W], values from -1 to 1."""
        x = (torch.cat([a, b]) - self.shift) / self.scale
        total = x.new_zeros(len(a))
        for number, (layer, channels) in enumerate(zip(self.layers, self.channels, strict=True)):
            if number in (1, 2):
                x = nn.functional.max_pool2d(x, 3, stride=2)
            x = layer(x).relu()
            unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
            difference = (unit[: len(a)] - unit[len(a) :]).square()
            total = total + (difference * channels).sum(1).mean((1, 2))
        return total


def load_lpips() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Return LPIPS as a function of two pictures, float32 [1, 3, H, W] from 0 to 255."""
    import torchmetrics

    channels = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    network, device = _network(find_weights("LPIPS", FILE, URL), channels), current_platform.device_type

    def distance(true: torch.Tensor, test: torch.Tensor) -> float:
        return float(network(true.to(device) / 127.5 - 1, test.to(device) / 127.5 - 1))

    return distance


@functools.cache
def _network(alexnet: Path, channels: Path) -> Lpips:
    try:
        network = Lpips().load(alexnet, channels)
    except (KeyError, RuntimeError, pickle.UnpicklingError) as error:  # another file, or a part of one
        raise broken_weights("LPIPS", alexnet, URL, error) from error
    return network.eval().to(current_platform.device_type)
