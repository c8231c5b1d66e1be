"""Sequence and tensor parallelism: ``enable_cache(..., parallelism_config=ParallelismConfig(...))``."""

from .config import ParallelismBackend, ParallelismConfig

__all__ = ["ParallelismBackend", "ParallelismConfig"]
