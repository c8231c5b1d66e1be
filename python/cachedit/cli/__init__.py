"""The command ``cachedit``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        sys.exit(f"cachedit needs the package {error.name!r} for this: pip install 'cachedit-kernels[demo]'")
    app()
