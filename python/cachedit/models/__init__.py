"""What is known about model families: data, not code."""

from .table import MODELS, BlockList, ModelEntry, find_entry

__all__ = ["MODELS", "BlockList", "ModelEntry", "find_entry"]
