"""Quantized weights: records that represent a matrix (N, K), with their `linear` and `embed`.

`expand(record)` is the matrix. `linear(record, x)` is the product with it: the value may come from
a faster kernel (`fast`), the derivatives are those of the plain form, in x and in the scales. Codes
are integers, without derivatives.
"""

import functools
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import errors
from ..layers import Weight, dense, embed, is_vector, linear, prepare, rows_times
from ..records import record
from . import packing
from .fast import MAX_FAST_ROWS, routed
from .packed import (
    PackedInt8,
    bfloat16_is_fast,
    pack_dynamic,
    pack_int4,
    pack_int8,
    straight_through,
    times_codes,
)
from .tiles import (
    DynamicTiles,
    NarrowTiles,
    Tiles,
    tile_affine,
    tile_int4,
    tile_int8,
    tile_narrow,
    value,
)

MOST_IN_BFLOAT16 = 24  # rows up to which products of three bfloat16 digits beat expanding the codes


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
class Reordered(NamedTuple):
    """A weight in a layout of a kernel, of inputs x[..., order]."""

    weight: Weight
    order: Tensor


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


RECORDS = (Int8, Int8Affine, Int8Dynamic, Int4, OrderedInt4, Codebook, Fp8, Ternary)


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


# Products and rows.


def times(weight: Weight, x: Tensor) -> Tensor:
    """The plain form: expand the matrix, then F.linear. Derivatives and vmap are those of this."""
    return F.linear(x, expand(weight).to(x.dtype))


for _kind in RECORDS:
    dense.register(_kind, lambda weight, columns, like: expand(weight).to(like.dtype))


@linear.register(Codebook)
@linear.register(Fp8)
@linear.register(Ternary)
def _(weight: Weight, x: Tensor) -> Tensor:
    return times(weight, x)


@linear.register
def _(weight: Int8, x: Tensor) -> Tensor:
    if (
        torch.compiler.is_compiling()
        and weight.scale.shape[-1] == 1
        and is_vector(x)
        and x.device.type == "cpu"
    ):
        return rows_times(weight.codes, x) * weight.scale.squeeze(-1).to(x.dtype)
    return routed(_plain_int8, _fast_int8, weight, x)


def _plain_int8(codes: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    return times(Int8(codes, scale), x)


def _fast_int8(codes: Tensor, scale: Tensor, x: Tensor) -> Tensor | None:
    """Tiles; or a product with the codes where bfloat16 is fast or there are no tiles."""
    narrow = x.dtype == torch.bfloat16 and len(x) > MOST_IN_BFLOAT16 and bfloat16_is_fast()
    out = None if narrow else _through(_form_int8(Int8(codes, scale), len(x)), x)
    return times_codes(codes, scale, x) if out is None else out


@linear.register
def _(weight: Int8Dynamic, x: Tensor) -> Tensor:
    return routed(_plain_dynamic, _fast_dynamic, weight, x)


def _plain_dynamic(codes: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """The product with rounded x, whose derivative in x ignores the rounding (straight-through)."""
    return times(Int8(codes, scale), straight_through(x, scale.shape[-1])).to(x.dtype)


def _fast_dynamic(codes: Tensor, scale: Tensor, x: Tensor) -> Tensor | None:
    return _through(_form_dynamic(Int8Dynamic(codes, scale), len(x)), x)


@linear.register
def _(weight: Int4, x: Tensor) -> Tensor:
    return routed(_plain_int4, _fast_int4, weight, x)


def _plain_int4(codes: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor:
    return times(Int4(codes, scale, zero), x)


def _fast_int4(codes: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor | None:
    return _through(_form_int4(Int4(codes, scale, zero), len(x)), x)


@linear.register
def _(weight: Int8Affine, x: Tensor) -> Tensor:
    return routed(_plain_affine, _fast_affine, weight, x)


def _plain_affine(codes: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor:
    return times(Int8Affine(codes, scale, zero), x)


def _fast_affine(codes: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor | None:
    return _through(tile_affine(codes, scale, zero, rows=len(x)), x)


@linear.register
def _(weight: OrderedInt4, x: Tensor) -> Tensor:
    return linear(weight.in_order, x[..., weight.order])


@linear.register
def _(weight: Reordered, x: Tensor) -> Tensor:
    return linear(weight.weight, x[..., weight.order])


def _form_int8(weight: Int8, rows: int) -> Weight:
    """The fastest layout for `rows` vectors: tiles or torch's kernel; None for the matrix."""
    if weight.codes.shape[-1] == 16 * weight.scale.shape[-1] > 16:
        return tile_narrow(*weight, rows=rows)
    tiles = tile_int8(*weight, rows=rows)
    return pack_int8(*weight) if tiles is None and rows <= MAX_FAST_ROWS else tiles


def _form_int4(weight: Int4, rows: int) -> Weight:
    tiles = tile_int4(*weight, rows=rows)
    return pack_int4(*weight) if tiles is None and rows <= MAX_FAST_ROWS else tiles


def _form_dynamic(weight: Int8Dynamic, rows: int) -> Weight:
    """torch's int8 product where a row has one scale, else tiles."""
    packed = pack_dynamic(*weight, rows=rows)
    if packed is not None:
        return packed
    tiles = tile_int8(*weight, rows=rows)
    return None if tiles is None else DynamicTiles(tiles, weight.scale)


def _through(form: Weight, x: Tensor) -> Tensor | None:
    if form is None or x.device.type != "cpu":
        return None
    in_tiles = isinstance(form, (Tiles, DynamicTiles, NarrowTiles))
    return value(form, x) if in_tiles else linear(form, x)


# Layouts for compiled decoding, which takes no derivatives.


@prepare.register
def _(weight: Int8, rows: int) -> Weight:
    form = _form_int8(weight, rows)
    # One vector is products and sums (see linear) rather than torch's kernel.
    by_rows = isinstance(form, PackedInt8) and rows == 1
    return weight if form is None or by_rows else form


@prepare.register
def _(weight: Int8Affine, rows: int) -> Weight:
    form = tile_affine(*weight, rows=rows)
    return weight if form is None else form


@prepare.register
def _(weight: Int4, rows: int) -> Weight:
    form = _form_int4(weight, rows)
    return weight if form is None else form


@prepare.register
def _(weight: OrderedInt4, rows: int) -> Weight:
    form = _form_int4(weight.in_order, rows)
    return weight if form is None else Reordered(form, weight.order)


@prepare.register
def _(weight: Int8Dynamic, rows: int) -> Weight:
    form = _form_dynamic(weight, rows)
    return weight if form is None else form


@embed.register(Int8)
@embed.register(Int8Affine)
@embed.register(Int8Dynamic)
@embed.register(Int4)
@embed.register(OrderedInt4)
@embed.register(Codebook)
@embed.register(Fp8)
@embed.register(Ternary)
def _(weight: Weight, ids: Tensor) -> Tensor:
    taken = ids.flatten()
    rows = [
        field if name in ("levels", "order") else field[taken]
        for name, field in zip(weight._fields, weight, strict=True)
    ]
    return expand(type(weight)(*rows)).reshape(*ids.shape, -1)


def _unknown(weight: Weight) -> NoReturn:
    remedy = "Make it with fa.quantize, or register its type with funcattn.quantization.expand."
    errors.fail(
        "expand", "weight", "a quantized record", f"a {type(weight).__name__}", remedy, TypeError
    )
