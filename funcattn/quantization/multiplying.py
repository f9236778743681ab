"""`linear`, `embed` and `prepare` of quantized weights.

`linear(record, x)` is the product with the record's matrix: the value may come from a faster kernel
(`fast`), the derivatives are those of the plain form, in x and in the scales. Codes are integers,
without derivatives.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.autograd import is_jit_traced, is_recorded
from ..layers import (
    Weight,
    dense,
    embed,
    is_vector,
    linear,
    linear_experts,
    prepare,
    rows_times,
)
from ..records import record
from .fast import MAX_FAST_ROWS, routed
from .formats import (
    RECORDS,
    Codebook,
    Fp8,
    Int4,
    Int8,
    Int8Affine,
    Int8Dynamic,
    OrderedInt4,
    Ternary,
    TwoLevelCodebook,
    expand,
)
from .packed import (
    PackedInt8,
    bfloat16_is_fast,
    pack_dynamic,
    pack_int4,
    pack_int8,
    straight_through,
    times_codes,
)
from .tiles import COLUMNS, DynamicTiles, Tiles, by_one_digit, value
from .tiling import tile_affine, tile_int4, tile_int8, tile_narrow

MOST_IN_BFLOAT16 = 24  # rows up to which products of three bfloat16 digits beat expanding the codes


@record
class Reordered(NamedTuple):
    """A weight in a layout of a kernel, of inputs x[..., order]."""

    weight: Weight
    order: Tensor


def times(weight: Weight, x: Tensor) -> Tensor:
    """The plain form: expand the matrix, then F.linear. Derivatives and vmap are those of this."""
    return F.linear(x, expand(weight).to(x.dtype))


for _kind in RECORDS:
    dense.register(_kind, lambda weight, columns, like: expand(weight).to(like.dtype))


@linear.register(Codebook)
@linear.register(TwoLevelCodebook)
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
    if tiles is not None and weight.shape[-1] == COLUMNS * weight.scale.shape[-1]:
        return by_one_digit(tiles)
    return None if tiles is None else DynamicTiles(tiles, weight.scale)


def _through(form: Weight, x: Tensor) -> Tensor | None:
    if form is None or x.device.type != "cpu":
        return None
    return value(form, x) if isinstance(form, (Tiles, DynamicTiles)) else linear(form, x)


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
@embed.register(TwoLevelCodebook)
@embed.register(Fp8)
@embed.register(Ternary)
def _(weight: Weight, ids: Tensor) -> Tensor:
    taken = ids.flatten()
    rows = [
        field if name in ("levels", "order") else field[taken]
        for name, field in zip(weight._fields, weight, strict=True)
    ]
    return expand(type(weight)(*rows)).reshape(*ids.shape, -1)


def _of_experts(weight: Weight, x: Tensor, expert: Tensor) -> Tensor:
    """Products by experts, one after the other where values are concrete: the matrix of an expert
    without tokens is not expanded. Otherwise all tokens times all matrices.
    """
    tensors = (*weight, x, expert)
    concrete = all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta for t in tensors)
    traced = torch.compiler.is_compiling() or is_jit_traced()
    if traced or not concrete or is_recorded(*tensors):
        return linear_experts.dispatch(object)(weight, x, expert)
    out = x.new_empty(len(x), weight.shape[-2])
    for number in expert.unique().tolist():
        rows = (expert == number).nonzero().squeeze(-1)
        one = type(weight)(*(field[number] for field in weight))
        if isinstance(one, Int8Dynamic):
            out[rows] = _plain_dynamic(one.codes, one.scale, x[rows])
        else:
            out[rows] = times(one, x[rows])
    return out


for _kind in RECORDS:
    linear_experts.register(_kind, _of_experts)
