"""mxfp4, as gpt-oss is published: experts in blocks of 32 numbers of 4 bits and a power of 2.

    ..._blocks (X, N, K / 32, 16), two codes a byte, the first in the low bits
    ..._scales (X, N, K / 32)      w = fp4[code] 2^(scale - 127)

A file of floats has the transpose, (X, K, N).

Source: OCP Microscaling Formats (MX) specification 1.0; the weights of gpt-oss.
"""

from collections.abc import Mapping

from ....layers import Weight
from ...families.tables import Json
from . import codes
from .stored import Dense, Read, Stored, Tensors

SIZE = 32


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of mxfp4."""
    return [_one(name, tensors) for name in tensors.ending("_blocks")]


def _one(name: str, tensors: Tensors) -> Stored:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    X, N, G, _ = tensors.shape(blocks, ("U8",), (None, None, None, SIZE // 2))
    tensors.shape(scales, ("U8",), (X, N, G))

    def read(tensor: Read) -> Weight | Dense:
        exponents = tensor(scales)
        if (exponents == 255).any():
            tensors.refuse(scales, "below 255, which stands for NaN", "255")
        return codes.fp4(tensor(blocks).flatten(-2), codes.powers(exponents))

    return Stored(name, (X, G * SIZE, N), (blocks, scales), read, turned=True)
