"""What is known about model families: data, not code."""

from .pipelines import DENOISERS, SEPARATE_CFG, calls_branches_in_turn, find_transformers
from .table import MODELS, UNCOVERED, BlockList, ModelEntry, find_entry

__all__ = [
    "DENOISERS",
    "MODELS",
    "SEPARATE_CFG",
    "UNCOVERED",
    "BlockList",
    "ModelEntry",
    "calls_branches_in_turn",
    "find_entry",
    "find_transformers",
]
