"""Quantization as a transform of params: `fa.quantize(fa.int4(group=32))(params)`; same decoder.

    schemes       int8, int4, w8a8, nf4, fp8, ternary: frozen values that encode a matrix
    formats       the records and their matrices (`expand`)
    multiplying   linear and embed of each
    packing       numbers to codes and scales, codes to bytes
    fast          products with the value of a fast kernel and the derivatives of the plain form
    packed tiles  weights in the layouts of torch's integer kernels and of the C++ operator
    transforms    quantize, dequantize
    rounding      round_activations: products with vectors of 8 bits
    reports       the error of each leaf
    calibration   gptq, awq, smooth, clipped: codes and scales fitted to the activations of a text

A new scheme is a record, its `dequantize`, and a value with `encode`: see docs/quantization.md.
"""

from ..tree import Where, predicate
from . import multiplying as multiplying  # registers linear, embed and prepare
from .formats import (
    RECORDS,
    Codebook,
    Fp8,
    Int4,
    Int8,
    Int8Affine,
    Int8Dynamic,
    OrderedInt4,
    Ternary,
    TwoLevelCodebook,
    expand,
    is_quantized,
)
from .reports import Report, report
from .rounding import RoundedInputs, round_activations
from .schemes import Scheme, fp8, int4, int8, nf4, ternary, w8a8
from .transforms import dequantize, is_multiplied, quantize

__all__ = [
    "RECORDS",
    "Codebook",
    "Fp8",
    "Int4",
    "Int8",
    "Int8Affine",
    "Int8Dynamic",
    "OrderedInt4",
    "Report",
    "RoundedInputs",
    "Scheme",
    "Ternary",
    "TwoLevelCodebook",
    "Where",
    "dequantize",
    "expand",
    "fp8",
    "int4",
    "int8",
    "is_multiplied",
    "is_quantized",
    "nf4",
    "predicate",
    "quantize",
    "report",
    "round_activations",
    "ternary",
    "w8a8",
]
