"""AWQ, of the layout "gemm": codes packed along the outputs, in an order of their own.

    qweight (K, N / 8)   scales (K / group, N)   qzeros (K / group, N / 8)
    w[n, k] = (code[k, n] - zero[g, n]) scales[g, n]

Outputs 8 i .. 8 i + 7 are in word i, at nibbles 0, 4, 1, 5, 2, 6, 3, 7: from the low bits up the
word has the outputs 0, 2, 4, 6, 1, 3, 5, 7.

Source: Lin et al., AWQ, arXiv:2306.00978; the modules of AutoAWQ.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .... import quantization
from ....layers import Weight
from ...families.tables import Json
from . import codes
from .stored import CONVERT, FLOATS, SETTINGS, WORDS, Dense, Read, Stored, Tensors, group_of, said
from .stored import wrong as refuse

NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]  # of output 0, 1, ... in a word
LOW = 0x0F0F0F0F


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of AWQ."""
    said(settings, "bits", [4], 4)
    said(settings, "zero_point", [True], True)
    layout = settings.get("version") or settings.get("format") or "gemm"
    if not isinstance(layout, str) or layout.lower() != "gemm":
        refuse(f"version in {SETTINGS}", "'gemm'", repr(layout), CONVERT)
    return [_one(module, settings, tensors) for module in tensors.ending(".qweight")]


def _one(module: str, settings: Mapping[str, Json], tensors: Tensors) -> Stored:
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    K, words = tensors.shape(names[0], WORDS, (None, None))
    size = group_of(settings, K, names[0])
    tensors.shape(names[1], WORDS, (K // size, words))
    tensors.shape(names[2], FLOATS, (K // size, 8 * words))
    if K % 2:
        tensors.refuse(names[0], "of an even number of inputs", (K, words))

    def read(tensor: Read) -> Weight | Dense:
        words = tensor(names[0]).view(torch.int32)
        points = _in_order(tensor(names[1])).mT.contiguous()
        scale = tensor(names[2]).mT.contiguous()
        if size % 2:
            return codes.four_bits(codes.paired(_in_order(words).mT), scale, points)
        return quantization.Int4(_halves(words, size), scale, codes.zero_of(scale, points))

    return Stored(f"{module}.weight", (8 * words, K), tuple(names), read)


def _in_order(words: Tensor) -> Tensor:
    """Words (K, N / 8) as codes (K, N)."""
    found = codes.unpacked(codes.bytes_of(words), 4).unflatten(-1, (-1, 8))
    return found[..., torch.tensor(NIBBLES)].flatten(-2)


def _halves(words: Tensor, size: int) -> Tensor:
    """Words (K, N / 8) as codes of a record (N, K / 2), groups of `size` inputs.

    Four codes at once: the low nibbles of a word, and those half a group of inputs on, are the
    bytes of four outputs, and so are the high ones.
    """
    K, W = words.shape
    found = torch.empty(W, 8, K // size, size // 2, dtype=torch.uint8)
    for out, block in codes.in_blocks(found, words.mT.contiguous()):
        first, second = block.unflatten(-1, (-1, 2, size // 2)).unbind(-2)  # (w, G, size / 2)
        low = (first & LOW) | ((second & LOW) << 4)
        high = ((first >> 4) & LOW) | (second & ~LOW)
        for i, joined in enumerate((low, high)):
            for j, bytes_ in enumerate(codes.bytes_of(joined).unflatten(-1, (-1, 4)).unbind(-1)):
                out[:, NIBBLES.index(2 * j + i)] = bytes_
    return found.reshape(8 * W, K // 2)
