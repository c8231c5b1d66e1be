"""Where the weights of learned metrics are. Nothing is ever downloaded: a value must not depend on the network."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["broken_weights", "find_weights"]

VARIABLE = "CACHEDIT_METRICS_WEIGHTS"


def find_weights(metric: str, file: str, url: str) -> Path:
    """Return the path of a file of weights, in the folder that ``CACHEDIT_METRICS_WEIGHTS`` names or in torch hub's.

    Raises:
        FileNotFoundError: If it is in neither; the message says where to get it and where to put it.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    for folder in (*folders, hub):
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(
        f"{metric} needs the file {file}, which is not on this machine: get it from {url} and put it into "
        f"{folders[0] if folders else hub} (or another folder that the variable {VARIABLE} names)"
    )


def broken_weights(metric: str, path: Path, url: str, error: Exception) -> ValueError:
    """What to raise for a file that is there, but cannot be read."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"{metric} cannot read its weights in {path}: {reason}; get the file again from {url}")
