"""Quantized checkpoints of other tools: what their codes mean, as records of the same numbers.

`quantization_config` of config.json names the method; each has a module, which finds the matrices
and makes records of them.

    methods     the table of methods, and the leaves of a file           codes    bits to records
    stored      what stands in a file for a matrix, and its checks       writing  the other way
    leaves      records to leaves: fused, split by expert, transposed
    gptq_files awq_files compressed_tensors float8 bitsandbytes mxfp4 mlx hqq torchao

A matrix that no record represents, or whose layer multiplies none, is dequantized: computed in
float32 and rounded once to the dtype of the model. One warning tells which.
"""

from .leaves import packed
from .methods import METHODS, Quantized, find, matrix, method_in, take_settings
from .stored import Entry, Tensors
from .writing import METHODS as WRITTEN
from .writing import flatten_as

__all__ = [
    "METHODS",
    "Entry",
    "Quantized",
    "Tensors",
    "WRITTEN",
    "find",
    "flatten_as",
    "matrix",
    "method_in",
    "packed",
    "take_settings",
]
