"""MLX: codes packed along the inputs, with scales and biases of groups.

    weight uint32 (N, K b / 32)   scales, biases (N, K / group)      w = code scale + bias

config.json has the settings in `quantization`: group_size, bits, and those of single modules by
name, or false for one that is not quantized.

Source: the function `quantize` of MLX.
"""

from collections.abc import Mapping

import torch

from .... import quantization
from ....layers import Weight
from ....quantization import packing
from ...families.tables import Json
from . import codes
from .stored import FLOATS, WORDS, Dense, Read, Stored, Tensors, group_of, said


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of MLX."""
    found = []
    for module in tensors.ending(".scales"):
        own = settings.get(module)
        found.append(
            _one(module, {**settings, **own} if isinstance(own, dict) else settings, tensors)
        )
    return found


def _one(module: str, settings: Mapping[str, Json], tensors: Tensors) -> Stored:
    said(settings, "mode", ["affine"], "affine")
    bits = said(settings, "bits", [2, 4, 8], 4)
    names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
    N, words = tensors.shape(names[0], WORDS, (None, None))
    K = words * 32 // bits
    G = K // group_of(settings, K, names[0], 64)
    for name in names[1:]:
        tensors.shape(name, FLOATS, (N, G))

    def read(tensor: Read) -> Weight | Dense:
        coded, scale, zero = codes.bytes_of(tensor(names[0])), tensor(names[1]), tensor(names[2])
        if bits == 8:
            return quantization.Int8Affine(coded, scale, zero)
        if K % (2 * G):
            each = codes.unpacked(coded, bits).float()
            by, shift = (packing.spread(x.float(), K) for x in (scale, zero))
            return Dense(torch.addcmul(shift, each, by), codes.UNEVEN)
        pairs = coded if bits == 4 else codes.paired(codes.unpacked(coded, bits))
        return quantization.Int4(codes.by_halves(pairs, K // G), scale, zero)

    return Stored(names[0], (N, K), tuple(names), read)
