"""The memory layout in which a weight is read fastest, computed once and cached with the weight.

    prepare(weight, rows)    for `linear` with that many vectors at once: the weight, or a record

It is for compiled code that is called repeatedly with the same weights: the prepared weight is an
input of that code, of which no derivative is taken. A record type registers an implementation with
`@prepare.register`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor

from .products import BLOCK, Weight, by_blocks

MAX_UNROLLED_VECTORS = 8  # products with a matrix are unrolled up to this: a register each

_kept: dict[tuple[Any, ...], tuple[tuple[ref[Tensor], ...], tuple[int, ...], Any]] = {}


def kept(sources: Sequence[Tensor], make: Callable[[], Any], kind: str) -> Any:
    """The cached result of make() for these tensors, recomputed after an in-place change.

    Args:
        sources: tensors; the entry is dropped when one of them is freed.
        make: called without arguments; computes the value from the tensors.
        kind: distinguishes several values that are computed from the same tensors.
    """
    key = (kind, *map(id, sources))
    versions = tuple(0 if source.is_inference() else source._version for source in sources)
    held = _kept.get(key)
    if held is None or held[1] != versions or any(have() is not source for have, source in zip(held[0], sources, strict=True)):
        forget = functools.partial(_kept.pop, key, None)
        held = tuple(ref(source, lambda _: forget()) for source in sources), versions, make()
        _kept[key] = held
    return held[2]


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
def _(weight: Tensor, rows: int) -> Tensor:
    if rows > MAX_UNROLLED_VECTORS or weight.dim() != 2 or weight.device.type != "cpu":
        return weight
    if rows > 1:
        return weight if len(weight) % BLOCK else kept([weight], lambda: by_blocks(weight), "blocks")
    return weight if weight.is_contiguous() else kept([weight], weight.contiguous, "rows")
