"""Codes of 2, 4 and 8 bits in words of 32 bits, and the records that they make.

All formats count from the low bits of a word: code i of b bits is at bit b i. Records have the
first half of a group in the low nibbles and the second in the high ones (quantization.packing).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .... import quantization
from ....layers import Weight
from ....quantization import packing
from .stored import Dense

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # bits -> a word of codes that are 1
BLOCK = 2**16  # codes at once: their halves stay in the cache and in one thread
UNEVEN = "its groups have an odd number of columns"
NO_ORDER = "records of 8 bits have no order of inputs"
IRREGULAR = "its groups of inputs differ in size"


def in_blocks(out: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of a contiguous result and of what it is made of, with the same rows."""
    flat = [x.reshape(-1, *x.shape[codes.dim() - 1 :]) for x in (out, codes)]
    rows = max(1, BLOCK // codes.shape[-1])
    return zip(*(x.split(rows) for x in flat), strict=True)


def bytes_of(words: Tensor) -> Tensor:
    """Words (N, n) as bytes (N, 4 n), the low ones first."""
    return words.contiguous().view(torch.uint8)


def unpacked(bytes_: Tensor, bits: int) -> Tensor:
    """Bytes (N, n) as codes (N, 8 n / bits), the low bits first."""
    if bits == 8:
        return bytes_
    shifts = [bytes_ >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(shifts, -1).flatten(-2)


def by_halves(pairs: Tensor, size: int) -> Tensor:
    """Bytes (*lead, K / 2) of neighbours, the first in the low nibble, in the order of a record.

    Args:
        size: columns of a group, even.

    Example:
        >>> by_halves(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4)  # 1, 2, 3, 4
        tensor([[49, 66]], dtype=torch.uint8)
    """
    if size % 4:
        return packing.pack(unpacked(pairs, 4), size, 4)
    found = torch.empty_like(pairs, memory_format=torch.contiguous_format)
    for out, block in in_blocks(found, pairs):
        first, second = block.unflatten(-1, (-1, 2, size // 4)).unbind(-2)
        low, high = out.unflatten(-1, (-1, size // 4, 2)).unbind(-1)
        torch.bitwise_or(first & 15, second << 4, out=low)
        torch.bitwise_or(first >> 4, second & 240, out=high)
    return found


def four_bits(pairs: Tensor, scale: Tensor, points: Tensor | int) -> Weight | Dense:
    """w = (code - point) scale of codes in pairs (*lead, K / 2), scale and points (*lead, G).

    Law: exact where scales have at most 16 bits, else within a unit in the last place of 15
        scales (test_quantized.py::test_codes_and_scales_are_those_of_the_file).
    """
    K, G = 2 * pairs.shape[-1], scale.shape[-1]
    if K % (2 * G):
        codes = unpacked(pairs, 4).float() - packing.spread(_full(points, scale).float(), K)
        return Dense(codes * packing.spread(scale.float(), K), UNEVEN)
    return quantization.Int4(by_halves(pairs, K // G), scale, zero_of(scale, points))


def zero_of(scale: Tensor, points: Tensor | int) -> Tensor:
    """-points scale, in the dtype of the scales where that is exact, else in float32."""
    wide = -(_full(points, scale).float() * scale.float())
    near = wide.to(scale.dtype)
    return near if torch.equal(near.float(), wide) else wide


def eight_bits(codes: Tensor, scale: Tensor, points: Tensor | int) -> Weight:
    """w = (code - point) scale of codes (*lead, K) in bytes, signed or not, scale and points
    (*lead, G).

    Law: exact where scales have at most 16 bits and points are integers, as of `four_bits`
        (test_quantized.py::test_codes_and_scales_are_those_of_the_file).
    """
    points = _full(points, scale).float()
    if codes.dtype == torch.uint8:
        if bool((points == 128).all()):
            return quantization.Int8((codes ^ 128).view(torch.int8), scale)
        return quantization.Int8Affine(codes, scale, zero_of(scale, points))
    if not points.any():
        return quantization.Int8(codes, scale)
    return quantization.Int8Affine(
        codes.view(torch.uint8) ^ 128, scale, zero_of(scale, points + 128)
    )


def _full(points: Tensor | int, scale: Tensor) -> Tensor:
    return points if isinstance(points, Tensor) else torch.full_like(scale, points)


def paired(each: Tensor) -> Tensor:
    """Codes (N, K) as pairs (N, K / 2), the first in the low nibble."""
    return each[:, ::2] | each[:, 1::2] << 4


def ordered(
    each: Tensor, scale: Tensor, points: Tensor | int, group: Tensor, bits: int
) -> Weight | Dense:
    """Codes (N, K) with the group of each column: neighbours by a permutation of the columns."""
    (_, K), G = each.shape, scale.shape[-1]
    even = torch.equal(group.bincount(minlength=G), torch.full((G,), K // G))
    if even and bits != 8 and K % (2 * G) == 0:
        order = group.argsort(stable=True)
        made = four_bits(paired(each[:, order]), scale, points)
        if isinstance(made, quantization.Int4):
            return quantization.OrderedInt4(*made, order.to(torch.int32))
    matrix = (each.float() - _full(points, scale).float()[:, group]) * scale.float()[:, group]
    return Dense(matrix, NO_ORDER if bits == 8 else IRREGULAR)


# The 16 numbers of 4 bits with 2 of exponent and 1 of mantissa: OCP Microscaling Formats, 5.3.3.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*FP4, *(-level for level in FP4))


def of_levels(pairs: Tensor, scale: Tensor, levels: Tensor) -> Weight | Dense:
    """w = levels[code] scale of codes in pairs (*lead, K / 2), scale (*lead, G), levels (16,)."""
    K, G = 2 * pairs.shape[-1], scale.shape[-1]
    if K % (2 * G):
        numbers = levels.float()[unpacked(pairs, 4).long()]
        return Dense(numbers * packing.spread(scale.float(), K), UNEVEN)
    each = levels.expand(*pairs.shape[:-2], len(levels)).contiguous()
    return quantization.Codebook(by_halves(pairs, K // G), scale, each)


def two_level_fp4(pairs: Tensor, scale: Tensor, divisor: Tensor) -> Weight:
    """w = fp4[code] (scale / divisor) of codes in pairs (N, K / 2), scale (N, K / 16) float8,
    divisor (1,) float32.
    """
    of_rows = divisor.expand(len(pairs), 1).contiguous()
    halves = by_halves(pairs, 2 * pairs.shape[-1] // scale.shape[-1])
    return quantization.TwoLevelCodebook(halves, scale, of_rows, torch.tensor(LEVELS))


def fp4(pairs: Tensor, scale: Tensor) -> Weight | Dense:
    """`of_levels` of 4-bit floating point."""
    return of_levels(pairs, scale, torch.tensor(LEVELS))


def powers(exponents: Tensor) -> Tensor:
    """2^(e - 127) of bytes e below 255 (E8M0), exactly, in bfloat16."""
    bits = exponents.to(torch.int16) << 7  # the exponent of a bfloat16
    return torch.where(bits == 0, 1 << 6, bits).to(torch.int16).view(torch.bfloat16)


def scaled_by_blocks(codes: Tensor, scale: Tensor, rows: int, columns: int) -> Weight | Dense:
    """w = code scale of codes (*lead, N, K) in int8 or float8, scale (*lead, N / rows, K / columns)
    rounded up: a record has a scale for each row.
    """
    (N, K), floating = codes.shape[-2:], codes.is_floating_point()
    by_row = scale[..., torch.arange(N) // rows, :]
    if K % columns and scale.shape[-1] > 1:
        each = by_row.float()[..., torch.arange(K) // columns]
        return Dense(codes.float() * each, "its last block of columns is cut off")
    return (quantization.Fp8 if floating else quantization.Int8)(codes, by_row)
