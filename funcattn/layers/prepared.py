"""The memory layout in which a weight is read fastest, computed once and cached with the weight.

    prepare(weight, rows)    for `linear` with that many vectors at once: the weight, or a record

It is for compiled code that is called repeatedly with the same weights: the prepared weight is an
input of that code, of which no derivative is taken. A record type registers an implementation with
`@prepare.register`.
"""

import functools

from torch import Tensor

from ..core.tensor_cache import prepared_from
from .products import BLOCK, Blocks, Weight, by_blocks

MAX_UNROLLED_VECTORS = 8  # products with a matrix are unrolled up to this: a register each


@functools.singledispatch
def prepare(weight: Weight, rows: int) -> Weight:
    """The weight for `linear` with that many vectors at once: itself, or a faster registered form.

    A matrix on the CPU that multiplies one vector is stored row-major; one that multiplies 2 to 8
    is stored as `Blocks`, if 16 divides its number of rows.

    Args:
        weight: (out, in), or a record.
        rows: how many vectors are multiplied at once.

    Law: linear(prepare(weight, n), x) is linear(weight, x) for x of n rows, up to rounding
        (test_prepared.py).
    """
    return weight


@prepare.register
def _(weight: Tensor, rows: int) -> Tensor | Blocks:
    if rows > MAX_UNROLLED_VECTORS or weight.dim() != 2 or weight.device.type != "cpu":
        return weight
    if rows > 1:
        return (
            weight
            if len(weight) % BLOCK
            else prepared_from([weight], lambda: by_blocks(weight), "blocks")
        )
    return weight if weight.is_contiguous() else prepared_from([weight], weight.contiguous, "rows")
