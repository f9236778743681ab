"""The arithmetic of quantization: numbers to codes and scales, codes to bytes, and back.

    w ~ codes * scale + zero          for groups of consecutive columns of a matrix (N, K)

All functions have static shapes and no branch on values. Two 4-bit codes are a byte: within a group
the first half of the columns are the low nibbles and the second half the high ones, as in GGUF
blocks, so a group is unpacked by one mask and one shift. Four 2-bit codes are a byte alike.
"""

import torch
from torch import Tensor

# Quantiles of a normal distribution with equal mass between two, and 0: Dettmers et al., QLoRA,
# arXiv:2305.14314, appendix E.
NF4 = (
    *(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
    ),
    *(
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
    ),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def groups(w: Tensor, size: int) -> Tensor:
    """(N, K) as (N, K / size, size)."""
    return torch.unflatten(w, -1, (-1, size))


def narrow(scale: Tensor) -> Tensor:
    """Scales in float16 where all are normal numbers of it, else in float32.

    Half the bytes; codes are computed from the rounded scales.
    """
    half = torch.finfo(torch.float16)
    size = scale.abs()
    fits = ((size == 0) | ((size >= half.smallest_normal) & (size <= half.max))).all()
    return scale.half() if bool(fits) else scale.float()


def symmetric(
    w: Tensor, size: int, largest: int, clip: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Codes -largest .. largest (int8) and scales (N, G) with w ~ codes * scale; a group of zeros
    has scale 0.

    Law: |codes * scale - w| <= scale / 2, up to the rounding of the scale (test_packing.py).
    """
    grouped = groups(w.float(), size)
    scale = narrow(grouped.abs().amax(-1) * clip / largest)
    return nearest(grouped, scale, largest), scale


def nearest(grouped: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The nearest codes, (N, K), of (N, G, size) with scales (N, G)."""
    by = torch.where(scale == 0, 1, scale.float()).unsqueeze(-1)
    return (grouped / by).round().clamp(-largest, largest).to(torch.int8).flatten(-2)


def affine(
    w: Tensor, size: int, levels: int, clip: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. levels - 1 (uint8), scales and zero points (N, G): w ~ codes * scale + zero.

    The range of a group is from its least to its greatest entry.

    Law: |codes * scale + zero - w| <= scale / 2, up to the rounding of both (test_packing.py).
    """
    grouped = groups(w.float(), size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    scale, zero = narrow(2 * half / (levels - 1)), middle - half
    kind = torch.finfo(torch.float16)
    # A subnormal zero point may be rounded where the scale is not: the error is far below a step.
    fits = (zero.abs() <= kind.max) & (
        (scale > 0) | (zero == 0) | (zero.abs() >= kind.smallest_normal)
    )
    zero = zero.half() if scale.dtype == torch.float16 and bool(fits.all()) else zero
    return nearest_affine(grouped, scale, zero, levels), scale, zero


def nearest_affine(grouped: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The nearest codes of (N, G, size), flat (N, K) uint8."""
    by = torch.where(scale == 0, 1, scale.float()).unsqueeze(-1)
    return (
        ((grouped - zero.float().unsqueeze(-1)) / by)
        .round()
        .clamp(0, levels - 1)
        .to(torch.uint8)
        .flatten(-2)
    )


def nearest_level(w: Tensor, levels: Tensor) -> Tensor:
    """The index (uint8) of the level nearest to each w; levels ascend."""
    borders = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(w, borders).to(torch.uint8)


def pack(codes: Tensor, size: int, bits: int) -> Tensor:
    """Codes (N, K) of `bits` bits, 4 or 2, in groups of `size` columns, as bytes (N, K bits /
    8).
    """
    parts = groups(codes, size).chunk(8 // bits, -1)
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | (part << (bits * i))
    return packed.flatten(-2)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse, of `count` groups: `unpack(pack(w, size, bits), K // size, bits) == w`."""
    rows = torch.unflatten(packed, -1, (count, -1))
    return torch.cat([(rows >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], -1).flatten(
        -2
    )


def spread(scale: Tensor, K: int) -> Tensor:
    """Scales (N, G) repeated for every column, (N, K)."""
    return scale.unsqueeze(-1).expand(*scale.shape, K // scale.shape[-1]).flatten(-2)
