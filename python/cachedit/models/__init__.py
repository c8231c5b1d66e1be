"""What is known about model families: data, not code."""

from .matrix import MatrixRow, describe_lists, matrix_rows
from .pipelines import DENOISERS, PIPELINES, PipelineEntry, calls_branches_in_turn, find_transformers
from .table import MODELS, UNCOVERED, BlockList, ModelEntry, find_entry

__all__ = [
    "DENOISERS",
    "MODELS",
    "PIPELINES",
    "UNCOVERED",
    "BlockList",
    "MatrixRow",
    "ModelEntry",
    "PipelineEntry",
    "calls_branches_in_turn",
    "describe_lists",
    "find_entry",
    "find_transformers",
    "matrix_rows",
]
