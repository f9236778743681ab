"""Quantized weights: records that represent a matrix (N, K).

`expand(record)` is the matrix. `linear` and `embed` of each are in `multiplying`.
"""

import functools
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors
from ..layers import Weight
from ..records import record
from . import packing


@record
class Int8(NamedTuple):
    """w ~ codes * scale: codes int8 (N, K), scale (N, G).

    One scale for each K / G consecutive columns of a row; G = 1 is one for the row.
    """

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return tuple(self.codes.shape)


@record
class Int8Dynamic(NamedTuple):
    """Int8 with activations rounded to 8 bits at run time, one scale per token and group of
    columns.
    """

    codes: Tensor  # int8 (N, K)
    scale: Tensor  # (N, G)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return tuple(self.codes.shape)


@record
class Int4(NamedTuple):
    """w ~ codes * scale + zero: codes uint8 (N, K / 2), two in a byte (see packing).

    scale and zero (N, G).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return *self.codes.shape[:-1], 2 * self.codes.shape[-1]


@record
class Int8Affine(NamedTuple):
    """w ~ codes * scale + zero: codes uint8 (N, K), scale and zero (N, G)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return tuple(self.codes.shape)


@record
class OrderedInt4(NamedTuple):
    """Int4 of a matrix whose columns are in another order: w[:, order] ~ codes * scale + zero.

    order int32 (K,): a group is of columns that need not be neighbours (GPTQ's act-order).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return self.in_order.shape

    @property
    def in_order(self) -> Int4:
        """The record of w[:, order]."""
        return Int4(self.codes, self.scale, self.zero)


@record
class Codebook(NamedTuple):
    """w ~ levels[codes] * scale: codes uint8 (N, K / 2), two a byte, scale (N, G), levels (16,)."""

    codes: Tensor
    scale: Tensor
    levels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return *self.codes.shape[:-1], 2 * self.codes.shape[-1]


@record
class TwoLevelCodebook(NamedTuple):
    """w ~ levels[codes] * (scale / divisor): a `Codebook` whose scales (N, G) are float8.

    divisor float32 (N, 1), of each row.

    Law: as large as the file of 4-bit floats that it is read from
        (test_quantized.py::test_codes_of_4_bits_take_no_more_memory_than_in_the_file).
    Source: NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149, section 2.
    """

    codes: Tensor
    scale: Tensor
    divisor: Tensor
    levels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return *self.codes.shape[:-1], 2 * self.codes.shape[-1]

    @property
    def at_one_level(self) -> Codebook:
        """The record with scales in float32, of the same matrix bit for bit."""
        wide = _wide(self.divisor)
        return Codebook(self.codes, self.scale.to(wide) / self.divisor.to(wide), self.levels)


@record
class Fp8(NamedTuple):
    """w ~ codes * scale: codes float8 (N, K), scale (N, 1)."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return tuple(self.codes.shape)


@record
class Ternary(NamedTuple):
    """w ~ (codes - 1) * scale: codes uint8 (N, K / 4), four in a byte, scale (N, G)."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return *self.codes.shape[:-1], 4 * self.codes.shape[-1]


RECORDS = (
    *(Int8, Int8Affine, Int8Dynamic, Int4, OrderedInt4),
    *(Codebook, TwoLevelCodebook, Fp8, Ternary),
)


@functools.singledispatch
def expand(weight: Weight) -> Tensor:
    """The matrix (N, K) of a record in float32; register other types by `@expand.register`."""
    _unknown(weight)


def is_quantized(node: object) -> bool:
    """True for a quantized record: an `is_leaf` for functions of `fa.tree`."""
    return expand.dispatch(type(node)) is not expand.dispatch(object)


@expand.register(Int8)
@expand.register(Int8Dynamic)
@expand.register(Fp8)
def _(weight: Weight) -> Tensor:
    codes = weight.codes.to(_wide(weight.scale))
    return codes * packing.spread(weight.scale.to(codes.dtype), codes.shape[-1])


@expand.register
def _(weight: Int4) -> Tensor:
    codes = packing.unpack(weight.codes, weight.scale.shape[-1], 4).to(_wide(weight.scale))
    K = codes.shape[-1]
    return torch.addcmul(
        packing.spread(weight.zero.to(codes.dtype), K),
        codes,
        packing.spread(weight.scale.to(codes.dtype), K),
    )


@expand.register
def _(weight: Int8Affine) -> Tensor:
    codes = weight.codes.to(_wide(weight.scale))
    zero, scale = (
        packing.spread(part.to(codes.dtype), codes.shape[-1])
        for part in (weight.zero, weight.scale)
    )
    return torch.addcmul(zero, codes, scale)


@expand.register
def _(weight: OrderedInt4) -> Tensor:
    place = weight.order.argsort(-1).unsqueeze(-2)  # where each column is
    return torch.take_along_dim(expand(weight.in_order), place, -1)


@expand.register
def _(weight: Codebook) -> Tensor:
    codes = packing.unpack(weight.codes, weight.scale.shape[-1], 4)
    wide = _wide(weight.scale)
    levels = weight.levels.to(wide)
    each = (
        levels[codes.long()]
        if levels.dim() == 1
        else torch.take_along_dim(levels.unsqueeze(-2), codes.long(), -1)  # of experts
    )
    return each * packing.spread(weight.scale.to(wide), codes.shape[-1])


@expand.register
def _(weight: TwoLevelCodebook) -> Tensor:
    return expand(weight.at_one_level)


@expand.register
def _(weight: Ternary) -> Tensor:
    codes = packing.unpack(weight.codes, weight.scale.shape[-1], 2).to(_wide(weight.scale)) - 1
    return codes * packing.spread(weight.scale.to(codes.dtype), codes.shape[-1])


def is_nearest(record: Int4 | Int8 | Int8Dynamic, weight: Tensor) -> bool:
    """True where the codes are those of round-to-nearest of a matrix (N, K) under the record's
    scales.
    """
    grouped = packing.groups(weight.float(), weight.shape[-1] // record.scale.shape[-1])
    if not isinstance(record, Int4):
        return torch.equal(record.codes, packing.nearest(grouped, record.scale, 127))
    symmetric = (packing.nearest(grouped, record.scale, 7) + 8).to(torch.uint8)
    affine = packing.nearest_affine(grouped, record.scale, record.zero, 16)
    return any(
        torch.equal(record.codes, packing.pack(codes, grouped.shape[-1], 4))
        for codes in (affine, symmetric)
    )


def _wide(scale: Tensor) -> torch.dtype:
    return torch.promote_types(scale.dtype, torch.float32)


def _unknown(weight: Weight) -> NoReturn:
    remedy = "Make it with fa.quantize, or register its type with funcattn.quantization.expand."
    errors.fail(
        "expand", "weight", "a quantized record", f"a {type(weight).__name__}", remedy, TypeError
    )
