"""Blocks of GGUF as quantized records, bit for bit: codes and scales of a group are those of the
block, its products are those of the operator for these codes.

    Q4_0 Q4_1 Q8_0      groups of 32, d and m float16 (hf.compressed)
    Q5_0                w = d (q - 16)            Int8, groups of 32
    Q5_1                w = d q + m               Int8Affine, groups of 32
    Q3_K Q6_K           w = (d s) (q - offset)    Int8, groups of 16
    Q4_K Q5_K           w = (d s) q - dmin m      Int4, Int8Affine, groups of 32
    IQ4_NL IQ4_XS MXFP4 w = (d s) table[q]        Int8, groups of 32

s and m of the K-quants are integers of 6 or 8 bits and d, dmin float16, so d s has at most 19
digits, and so has its product with a code: float32 holds both exactly.

Source: github.com/ggml-org/llama.cpp, ggml-quants.c; the layouts of gguf.quants, to which
    test_blocks.py holds them.
"""

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL, MXFP4
from torch import Tensor

from ... import quantization
from ...layers import Weight
from ...quantization import packing
from ..families.tables import Json
from ..hf import compressed

Array = np.ndarray  # (rows, blocks of a row, bytes), or what is in them
SUPER = 256  # numbers of a block of the K-quants


def _half(raw: Array, first: int) -> Array:
    """A float16 of each block in float32, (rows, blocks, 1)."""
    return raw[..., first : first + 2].copy().view(np.float16).astype(np.float32)


def _planes(raw: Array, bits: int, run: int) -> Array:
    """Codes of `bits` bits, flat in a block: bytes come in runs, whose lowest bits are the first
    `run` numbers, the next bits the following ones.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = raw.reshape(*raw.shape[:2], -1, 1, run)
    return ((runs >> shifts) & (2**bits - 1)).reshape(*raw.shape[:2], -1)


def _six_bits(raw: Array) -> tuple[Array, Array]:
    """The 8 scales and 8 minima of 6 bits in 12 bytes of Q4_K and Q5_K."""
    low, mins, high = np.split(raw, 3, -1)
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], -1)
    return scales, np.concatenate([mins & 63, (high >> 4) | ((mins >> 2) & 48)], -1)


def _signed(codes: Array, scale: Array) -> Weight:
    return quantization.Int8(_flat(codes.astype(np.int8)), _flat(scale))


def _affine(codes: Array, scale: Array, zero: Array) -> Weight:
    return quantization.Int8Affine(_flat(codes.astype(np.uint8)), _flat(scale), _flat(zero))


def _flat(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).flatten(1)


def _fifth_bits(raw: Array) -> Array:
    """The codes of Q5_0 and Q5_1: 4 bytes of highest bits, then nibbles."""
    high = np.unpackbits(raw[..., :4], axis=-1, bitorder="little")
    return _planes(raw[..., 4:], 4, 16) | (high << 4)


def _q5_0(raw: Array) -> Weight:
    return _signed(_fifth_bits(raw[..., 2:]).astype(np.int8) - 16, _half(raw, 0))


def _q5_1(raw: Array) -> Weight:
    return _affine(_fifth_bits(raw[..., 4:]), _half(raw, 0), _half(raw, 2))


def _q3_k(raw: Array) -> Weight:
    low, high = _planes(raw[..., 32:96], 2, 32), _planes(raw[..., :32], 1, 32)
    packed = raw[..., 96:108]
    scales = _planes(packed[..., :8], 4, 8) | (_planes(packed[..., 8:], 2, 4) << 4)
    codes = low.astype(np.int8) - ((high ^ 1) << 2).astype(np.int8)
    return _signed(codes, _half(raw, 108) * (scales.astype(np.int8) - 32).astype(np.float32))


def _q4_k(raw: Array) -> Weight:
    scales, mins = _six_bits(raw[..., 4:16])
    codes = _flat(_planes(raw[..., 16:], 4, 32))
    scale, zero = _flat(_half(raw, 0) * scales), _flat(-(_half(raw, 2) * mins))
    return quantization.Int4(packing.pack(codes, 32, 4), scale, zero)


def _q5_k(raw: Array) -> Weight:
    scales, mins = _six_bits(raw[..., 4:16])
    codes = _planes(raw[..., 48:], 4, 32) | (_planes(raw[..., 16:48], 1, 32) << 4)
    return _affine(codes, _half(raw, 0) * scales, -(_half(raw, 2) * mins))


def _q6_k(raw: Array) -> Weight:
    codes = _planes(raw[..., :128], 4, 64) | (_planes(raw[..., 128:192], 2, 32) << 4)
    scales = raw[..., 192:208].view(np.int8).astype(np.float32)
    return _signed(codes.astype(np.int8) - 32, _half(raw, 208) * scales)


def _iq4_nl(raw: Array) -> Weight:
    return _signed(np.array(IQ4_NL.kvalues, np.int8)[_planes(raw[..., 2:], 4, 16)], _half(raw, 0))


def _iq4_xs(raw: Array) -> Weight:
    high = raw[..., 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], -1).reshape(*raw.shape[:2], -1)
    scales = (low | ((high.astype(np.uint8) & 3) << 4)).astype(np.int8) - 32
    codes = np.array(IQ4_NL.kvalues, np.int8)[_planes(raw[..., 8:], 4, 16)]
    return _signed(codes, _half(raw, 0) * scales.astype(np.float32))


def _mxfp4(raw: Array) -> Weight:
    scale = MXFP4.e8m0_to_fp32_half(raw[..., :1])
    return _signed(np.array(MXFP4.kvalues, np.int8)[_planes(raw[..., 1:], 4, 16)], scale)


RECORDS: dict[str, Callable[[Array], Weight]] = {
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
KEPT = RECORDS.keys() | compressed.BLOCKS.keys()


def from_blocks(data: Json, start: int, rows: int, columns: int, kind: str) -> Weight:
    """The record of a matrix in GGUF blocks, bit for bit.

    Args:
        data: bytes, of which the blocks begin at `start`.
        rows, columns: of the matrix; a row is of whole blocks.
        kind: one of KEPT.

    Law: the matrix is that of gguf.quants, bit for bit
        (test_blocks.py::test_a_kept_matrix_is_the_dequantized_one).
    """
    if kind in compressed.BLOCKS:
        return compressed.from_blocks(data, start, rows, columns, kind)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.frombuffer(data, np.uint8, rows * columns // block * size, start)
    with np.errstate(all="ignore"):  # a damaged scale may be infinite, and then the weight is
        return RECORDS[kind](raw.reshape(rows, columns // block, size))
