"""Rows of keys and values in 8 or 4 bits: rotated, then coded in groups.

    x H ~ low + scale * code    code in 0 .. 2^bits - 1, low the least and scale the step of a group

H is an orthogonal matrix of +-1 / sqrt(n), Hadamard's, on n features at a time: it divides what a
large feature has among n features, and is its own inverse. A group is one rotated feature of 32
tokens for keys, up to 64 rotated features of one token for values.

Source: Ashkboos et al., QuaRot: Outlier-free 4-bit inference in rotated LLMs, arXiv:2404.00456,
section 4; Liu et al., KIVI, arXiv:2402.02750, section 3, for the axes of the groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..records import record

KEY_GROUP, VALUE_GROUP = 32, 64  # tokens, and features, if the sizes are multiples of them
LARGEST = 256  # features of one rotation


@record
class QuantizedBlock(NamedTuple):
    """R coded rows of keys or of values, by groups of g along the last axis of the codes.

    With 4 bits a byte holds the codes i (low bits) and i + h (high bits) of its group, where h is
    half of g, rounded up: B bytes in place of g codes.
    """

    codes: Tensor  # uint8; keys (L, K, D, R / g B), feature by feature; values (L, K, R, D / g B)
    scale: Tensor  # keys (L, K, R / g, D); values (L, K, D / g, R)
    low: Tensor  # as scale, same shape


def _signs(n: int) -> Tensor:
    """Sylvester's matrices of 1, 2, 4, ... n features, each the corner of the next: int8."""
    signs = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(signs) < n:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


SIGNS = _signs(LARGEST)


def rotation_size(D: int) -> int:
    """The features that are rotated together: the largest power of two that divides D, to 256."""
    return min(D & -D, LARGEST) if D else 1


def rotate(x: Tensor) -> Tensor:
    """x H, for the features of (..., D) in blocks of `rotation_size(D)`.

    Law: its own inverse, and leaves dot products as they are
        (test_codes.py::test_a_rotation_is_its_own_inverse_and_keeps_dot_products).
    """
    n = rotation_size(x.shape[-1])
    if n == 1:
        return x
    H = SIGNS[:n, :n].to(x.device, x.dtype) / n**0.5
    return (torch.unflatten(x, -1, (-1, n)) @ H).flatten(-2)


def encode_keys(x: Tensor, bits: int) -> QuantizedBlock:
    """Code keys (..., R, D): a group is one rotated feature of 32 rows, or of all R."""
    return encode(rotate(_wide(x)).mT.to(x.dtype), _group(x.shape[-2], KEY_GROUP), bits)


def encode_values(x: Tensor, bits: int) -> QuantizedBlock:
    """Code values (..., R, D): a group is 64 rotated features of one row, or all D."""
    return encode(rotate(_wide(x)).to(x.dtype), _group(x.shape[-1], VALUE_GROUP), bits)


def decode_keys(coded: QuantizedBlock, R: int) -> Tensor:
    """The keys (..., R, D) that a block stands for, in the dtype of the scale."""
    return rotate(_decoded(coded, R, _group(R, KEY_GROUP)).mT).to(coded.scale.dtype)


def decode_values(coded: QuantizedBlock, D: int) -> Tensor:
    """The values (..., R, D) that a block stands for, in the dtype of the scale."""
    return rotate(_decoded(coded, D, _group(D, VALUE_GROUP))).to(coded.scale.dtype)


def encode(x: Tensor, group: int, bits: int) -> QuantizedBlock:
    """Quantize (..., M, N) to 8 or 4 bits, each `group` of the last axis with its scale.

    Args:
        x: floating (..., M, N).
        group: a divisor of N.
        bits: 8 or 4.

    Law: decoding is within half a scale of x, and encoding what was decoded changes nothing but
        rounding (test_codes.py::test_a_decoded_number_is_within_half_a_step).
    """
    if not x.numel():  # nothing to encode, and no group of which to take a minimum
        count = x.shape[-1] // group if group else 0
        return QuantizedBlock(
            x.to(torch.uint8), *[x.new_zeros(*x.shape[:-2], count, x.shape[-2])] * 2
        )
    grouped = torch.unflatten(x, -1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    levels = 2**bits - 1
    scale = ((_wide(high) - _wide(low)) / levels).to(x.dtype)
    step = torch.where(scale == 0, 1, scale)
    codes = ((_wide(grouped) - _wide(low)) / _wide(step)).round().clamp(0, levels).to(torch.uint8)
    if bits == 4:
        half = (group + 1) // 2
        codes = torch.nn.functional.pad(codes, (0, 2 * half - group))
        codes = codes[..., :half] | (codes[..., half:] << 4)
    of_groups = lambda x: x.squeeze(-1).mT.contiguous()
    return QuantizedBlock(codes.flatten(-2).contiguous(), of_groups(scale), of_groups(low))


def decode(coded: QuantizedBlock, N: int, group: int) -> Tensor:
    """Dequantize to (..., M, N), in the dtype of the scale."""
    return _decoded(coded, N, group).to(coded.scale.dtype)


def bits_of(codes: Tensor, N: int) -> int:
    """The bits of codes that stand for N numbers; of one number all codes are 0, in any bits."""
    return 8 if codes.shape[-1] == N else 4


def _decoded(coded: QuantizedBlock, N: int, group: int) -> Tensor:
    codes = torch.unflatten(coded.codes, -1, (N // group, -1)) if N else coded.codes.unsqueeze(-1)
    if bits_of(coded.codes, N) == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)[..., :group]
    scale, low = (x.mT.unsqueeze(-1) for x in (coded.scale, coded.low))
    return (codes.to(_wide(scale).dtype) * scale + low).flatten(-2)


def _group(N: int, size: int) -> int:
    return N if N % size else min(N, size)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
