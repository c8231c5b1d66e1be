"""Quantization of linear layers over torchao: what a user asks for, the table of types, and what applies them."""

from .apply import Quantization, prepare_quantization, quantize
from .config import QuantizeBackend, QuantizeConfig

__all__ = ["Quantization", "QuantizeBackend", "QuantizeConfig", "prepare_quantization", "quantize"]
