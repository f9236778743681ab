"""HQQ: codes of a matrix in rows of groups, with scales and zero points in floats.

    W_q (R b / 8, C) of codes (R, C), the matrix in rows of `group_size` numbers (axis 1: R of
    them; axis 0: C of them)     scale, zero     w = (code - zero) scale

The first R b / 8 rows of codes are in the high bits. Each module has its settings as tensors.

Source: Badri and Shaji, Half-quadratic quantization, and the module HQQLinear of `hqq`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .... import quantization
from ....layers import Weight
from ....quantization import packing
from ...families.tables import Json
from .stored import CONVERT, FLOATS, Dense, Read, Stored, Tensors, wrong

PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2}
USELESS = (
    *("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero", "quant_scale", "quant_zero", "unpack_view_dtype"),
)


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of HQQ."""
    return [_one(module, tensors) for module in tensors.ending(".W_q")]


def _text(tensors: Tensors, name: str) -> str:
    size = tensors.shape(name, ("U8",), (None,))[0]
    return "".join(map(chr, tensors.read(name).tolist())) if size < 100 else ""


def _number(tensors: Tensors, name: str) -> int:
    tensors.shape(name, ("I32", "U8", "I64"), ())
    return int(tensors.read(name))


def _one(module: str, tensors: Tensors) -> Stored:
    name = lambda part: f"{module}.{part}"
    packed = tensors.shape(name("W_q"), ("U8",), (None, None))
    packing_ = _text(tensors, name("packing"))
    if packing_ not in PACKINGS:
        wrong(name("packing"), f"one of {', '.join(PACKINGS)}", repr(packing_), CONVERT)
    bits = PACKINGS[packing_]
    for flag in ("view_as_float", "quant_scale", "quant_zero"):
        if name(flag) in tensors.found and _number(tensors, name(flag)):
            wrong(name(flag), "false", "true", CONVERT)
    tensors.shape(name("shape"), ("I64", "I32"), (2,))
    N, K = tensors.read(name("shape")).tolist()
    axis = _number(tensors, name("axis"))
    R, C = packed[0] * 8 // bits, packed[1]
    if N < 1 or K < 1 or R * C != N * K or axis not in (0, 1):
        tensors.refuse(name("W_q"), f"the codes of ({N}, {K})", packed)
    for part, size in (("nbits", bits), ("group_size", C if axis else R)):
        if name(part) in tensors.found and (told := _number(tensors, name(part))) != size:
            tensors.refuse(name(part), f"{size}, as {name('W_q')} has it", told)
    sizes = (R, 1) if axis else (1, C)
    for part in ("scale", "zero"):
        tensors.shape(name(part), FLOATS, sizes)
    needed = ("W_q", "scale", "zero", "packing", "shape", "axis")
    others = [*USELESS, "nbits", "group_size", "view_as_float"]
    parts = (*needed, *(part for part in others if name(part) in tensors.found))

    def read(tensor: Read) -> Weight | Dense:
        coded = tensor(name("W_q"))
        each = torch.cat([coded >> shift & (2**bits - 1) for shift in range(8 - bits, -1, -bits)])
        scale, zero = tensor(name("scale")), tensor(name("zero"))
        if axis and K % C == 0 and (bits == 8 or C % 2 == 0):
            return _record(each, scale, zero, N, bits)
        matrix = (each.float() - zero.float()) * scale.float()
        return Dense(matrix.reshape(N, K), "its groups are not of neighbouring inputs")

    return Stored(name("weight"), (N, K), tuple(map(name, parts)), read)


def _record(each: Tensor, scale: Tensor, zero: Tensor, N: int, bits: int) -> Weight:
    """The record of codes (N G, group), whose zero is that of the format times the scale."""
    by, shift = scale.reshape(N, -1), -(zero.float() * scale.float()).reshape(N, -1)
    if bits == 8:
        return quantization.Int8Affine(each.reshape(N, -1), by, shift)
    return quantization.Int4(packing.pack(each.reshape(N, -1), each.shape[-1], 4), by, shift)
