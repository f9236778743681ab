"""Quantization as a transform of the tree: `params = fa.quantize(fa.int4(group=32))(params)`, and the decoder is untouched.

    weights      the records, what each stands for (dequantize), how it multiplies and embeds
    kernels of   fast: a faster kernel for the value, exact derivatives of the plain form; packed: torch's, tiles: our own
    schemes      int8, int4, w8a8, nf4, fp8, ternary: frozen values that encode a matrix
    transforms   quantize, dequantize
    reports      what that did to each leaf

A scheme of one's own is a record, its `dequantize`, and a value with `encode`: see docs/quantization.md.
"""

from .reports import Report, report
from .schemes import Scheme, fp8, int4, int8, nf4, ternary, w8a8
from .transforms import Where, dequantize, quantize
from .weights import RECORDS, Codebook, Fp8, Int4, Int8, Int8Dynamic, Ternary, expand, is_quantized

__all__ = [
    "RECORDS",
    "Codebook",
    "Fp8",
    "Int4",
    "Int8",
    "Int8Dynamic",
    "Report",
    "Scheme",
    "Ternary",
    "Where",
    "dequantize",
    "expand",
    "fp8",
    "int4",
    "int8",
    "is_quantized",
    "nf4",
    "quantize",
    "report",
    "ternary",
    "w8a8",
]
