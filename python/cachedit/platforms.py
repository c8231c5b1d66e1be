"""The device that this process works on, as scripts of ``cache_dit`` ask for it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["current_platform"]


class Platform:
    """The accelerator that torch finds, or the CPU.

    Other attributes are those of torch's module for the device: ``current_platform.empty_cache()`` is
    ``torch.cuda.empty_cache()`` on a CUDA machine.
    """

    @property
    def device_type(self) -> str:
        """``"cuda"``, ``"xpu"``, ... or ``"cpu"``."""
        device = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if device is None else device.type

    def is_accelerator_available(self) -> bool:
        """Whether there is another device than the CPU."""
        return torch.accelerator.is_available()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.get_device_module(self.device_type), name)


current_platform = Platform()
