"""Several metrics over pairs of pictures, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .sources import Media, Pair, matched_files, read_pairs

__all__ = ["HIGHER_IS_BETTER", "METRICS", "PAIRWISE", "Comparison", "compare", "load_distribution", "load_pairwise"]

PairFunction = Callable[[torch.Tensor, torch.Tensor], float]  # two pictures, float32 [1, 3, H, W] from 0 to 255

PAIRWISE = ("psnr", "ssim", "mse", "lpips")
METRICS = (*PAIRWISE, "fid")
HIGHER_IS_BETTER = {"psnr", "ssim", "clip_score", "image_reward"}


@dataclass
class Comparison:
    """What came out of comparing two files or folders.

    Args:
        count: Pairs of pictures or frames.
        values: One per metric, over all pairs.
        pairs: The name of each pair, and its value per metric that a pair has (FID is of all pictures together).
    """

    count: int = 0
    values: dict[str, float] = field(default_factory=dict)
    pairs: list[tuple[str, dict[str, float]]] = field(default_factory=list)


class Distribution(Protocol):
    """A metric that needs all pictures before it has a value."""

    def add(self, pair: Pair) -> None: ...
    def value(self) -> float: ...


def compare(
    metrics: Sequence[str],
    true: Media,
    test: Media,
    fid_batch_size: int = 1,
    advance: Callable[[int, int], None] = lambda done, files: None,
) -> Comparison:
    """Compare pictures, videos or folders of them by several metrics, reading each file once.

    Args:
        metrics: Names out of :data:`METRICS`.
        true: The baseline.
        test: What to compare with it.
        fid_batch_size: Pictures that go through Inception at a time.
        advance: Called after each file with the number of files done and of all files.

    Raises:
        ValueError, FileNotFoundError, ImportError: As :func:`cachedit.metrics.compute_psnr`; before anything is read
            where it can be known then.
    """
    functions = {name: load_pairwise(name) for name in metrics if name in PAIRWISE}
    distributions = {name: load_distribution(fid_batch_size) for name in metrics if name not in PAIRWISE}
    files, result = matched_files(true, test), Comparison()
    for done, file in enumerate(files, start=1):
        for pair in read_pairs(*file):
            a, b = pair.true[None].float(), pair.test[None].float()
            result.pairs.append((pair.name, {name: function(a, b) for name, function in functions.items()}))
            for distribution in distributions.values():
                distribution.add(pair)
        advance(done, len(files))
    result.count = len(result.pairs)
    for name in metrics:
        if name in functions:
            result.values[name] = mean([values[name] for _, values in result.pairs])
        else:
            result.values[name] = distributions[name].value()
    return result


def mean(values: Sequence[float]) -> float:
    """The mean of the finite values; infinite (the PSNR of equal pictures) where there are no others."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


def load_pairwise(name: str) -> PairFunction:
    """One of :data:`PAIRWISE` as a function. FileNotFoundError where its weights are not here."""
    if name == "lpips":
        from .lpips import load_lpips

        return load_lpips()
    from torchmetrics.functional import mean_squared_error
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    def ssim(true: torch.Tensor, test: torch.Tensor) -> object:
        if min(true.shape[2:]) <= 5:
            raise ValueError(f"ssim needs pictures of at least 6 pixels on each side, got {list(true.shape[2:])}")
        return structural_similarity_index_measure(test, true, data_range=255.0)

    functions: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        "psnr": lambda true, test: peak_signal_noise_ratio(test, true, data_range=255.0),
        "ssim": ssim,
        "mse": lambda true, test: mean_squared_error(test, true),
    }
    return lambda true, test: float(functions[name](true, test))  # type: ignore[arg-type]


def load_distribution(batch_size: int = 1) -> Distribution:
    """FID over pictures that are yet to come. FileNotFoundError where its weights are not here."""
    from .fid import FidDistribution

    return FidDistribution(batch_size)
