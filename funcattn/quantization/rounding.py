"""Activations in 8 bits: quantized weights that multiply rounded vectors.

    params = fa.quantization.round_activations()(params)        of int8, int4, GGUF blocks

    y = W round(x)        each 32 numbers of x to multiples of 1 / 127 of their largest

Products of quantized weights are exact in x by default: x is three digits of 8 bits (see `tiles`).
One digit is a third of the multiplications, which are what a prompt, or a step of several drafts,
takes. An entry of x is off by at most 1 / 254 of the largest of its 32, and y by at most that times
the sum of |W| over these columns; llama.cpp multiplies its blocks in this way. The derivative in x
is that without rounding (the straight-through estimator).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layers, tree
from ..core import errors
from ..core.doors import door
from ..layers import Weight, dense, embed, linear, linear_experts, prepare
from ..records import record
from ..tree import Tree, Where
from ..tree.selection import chooses_none
from .fast import routed
from .formats import Int4, Int8, Int8Affine, expand, is_quantized
from .packed import straight_through
from .tiles import COLUMNS, Tiles, by_one_digit, value
from .tiling import tile_affine, tile_int4, tile_int8

ROUNDED = (Int8, Int8Affine, Int4)


@record
class RoundedInputs(NamedTuple):
    """A quantized weight (N, K), 32 a divisor of K, whose inputs are rounded to 8 bits."""

    weight: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (N, K)."""
        return self.weight.shape


@door
def round_activations(where: Where | None = None) -> Callable[[Tree], Tree]:
    """A transform of params: quantized weights that round what they multiply to 8 bits.

    Codes and scales are unchanged and shared with the given tree, `fa.dequantize` gives the same
    matrices, and an embedding that is no head gives the same rows.

    Args:
        where: a regular expression that the whole path of a weight must match, or a predicate of
            (path, record). None selects every Int8, Int8Affine and Int4 with a number of columns
            that 32 divides.

    Raises:
        ValueError: no weight is selected.
        TypeError: a selected weight of another kind, or of other columns.

    Law: the product with the rounded vector
        (test_rounding.py::test_it_multiplies_the_rounded_vector), off by half a step of each number
        at most (::test_an_entry_is_off_by_half_a_step).

    Example:
        >>> import funcattn as fa
        >>> small = fa.quantize(fa.int4, "w")({"w": torch.ones(4, 32)})
        >>> linear(round_activations()(small)["w"], torch.ones(32))
        tensor([32., 32., 32., 32.])
    """
    choose = None if where is None else tree.predicate("round_activations", where)

    @door(name="round_activations(where)")
    def transform(params: Tree) -> Tree:
        met = []

        def wrap(path: str, leaf: Weight) -> Weight:
            fits = isinstance(leaf, (*ROUNDED, RoundedInputs)) and not leaf.shape[-1] % COLUMNS
            if not (fits if choose is None else choose(path, leaf)):
                return leaf
            met.append(path)
            if isinstance(leaf, RoundedInputs):
                return leaf
            if not fits:
                wanted = f"Int8, Int8Affine or Int4 with a multiple of {COLUMNS} columns"
                got = f"a {type(leaf).__name__} of shape {tuple(leaf.shape)}"
                remedy = "Quantize it first (fa.int8, fa.int4), or leave it out by where."
                errors.fail("round_activations", path, wanted, got, remedy, TypeError)
            return RoundedInputs(leaf)

        out = tree.map_with_path(wrap, params, is_leaf=is_quantized)
        if not met:
            chooses_none("round_activations", where)
        return out

    return transform


@expand.register
def _(weight: RoundedInputs) -> Tensor:
    return expand(weight.weight)


@embed.register
def _(weight: RoundedInputs, ids: Tensor) -> Tensor:
    return embed(weight.weight, ids)


@dense.register
def _(weight: RoundedInputs, columns: int, like: Tensor) -> Tensor:
    return dense(weight.weight, columns, like)


@layers.fields.register
def _(weight: RoundedInputs, division: layers.layouts.Division) -> Tree:
    return RoundedInputs(layers.fields(weight.weight, division))


@linear.register
def _(weight: RoundedInputs, x: Tensor) -> Tensor:
    kind = type(weight.weight)

    def plain(*inputs: Tensor) -> Tensor:
        x = inputs[-1]
        return F.linear(_rounded(x), expand(kind(*inputs[:-1])).to(_wide(x))).to(x.dtype)

    def fast(*inputs: Tensor) -> Tensor | None:
        x = inputs[-1]
        tiles = _tiles(kind(*inputs[:-1]), len(x)) if x.device.type == "cpu" else None
        return None if tiles is None else value(tiles, x)

    return routed(plain, fast, weight.weight, x)


@linear_experts.register
def _(weight: RoundedInputs, x: Tensor, expert: Tensor) -> Tensor:
    return linear_experts(weight.weight, _rounded(x).to(x.dtype), expert)


@prepare.register
def _(weight: RoundedInputs, rows: int) -> Weight:
    tiles = _tiles(weight.weight, rows)
    return weight if tiles is None else tiles


def _rounded(x: Tensor) -> Tensor:
    return straight_through(x, x.shape[-1] // COLUMNS)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(weight: Weight, rows: int) -> Tiles | None:
    make = {Int8: tile_int8, Int8Affine: tile_affine, Int4: tile_int4}[type(weight)]
    tiles = make(*weight, rows=rows)
    return None if tiles is None else by_one_digit(tiles)
