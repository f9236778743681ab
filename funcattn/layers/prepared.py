"""The form in which a weight is read fastest, made once and kept while the weight is.

    prepare(weight, rows)          for that many vectors at once: the weight itself, or a value that `linear` takes in its place

For compiled code that is called with the same weights again and again: what is prepared is an input of that code, of which
no derivative is taken. A record registers its own way: `@prepare.register`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor

from .products import BLOCK, by_blocks

MAX_UNROLLED_VECTORS = 8  # whose products with a matrix are written out: each has a sum of its own, in a register

_kept: dict[tuple[Any, ...], tuple[tuple[ref[Tensor], ...], tuple[int, ...], Any]] = {}


def kept(sources: Sequence[Tensor], make: Callable[[], Any], kind: str) -> Any:
    """What make() gives for these tensors: made at the first call, and again after one of them was written into.

    Args:
        sources: tensors; what was made goes when one of them does.
        make: from these tensors to another value.
        kind: tells apart what is made of the same tensors.
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
def prepare(weight: Any, rows: int) -> Any:
    """The weight for `linear` with that many vectors at once: itself, unless its type registered a faster form.

    A matrix on the CPU that meets one vector is stored row after row, and one that meets 2 to 8 in `Blocks`, if these divide it.

    Law: linear(prepare(weight, n), x) is linear(weight, x) for x of n rows, up to rounding (test_prepared.py).
    """
    return weight


@prepare.register
def _(weight: Tensor, rows: int) -> Tensor:
    if rows > MAX_UNROLLED_VECTORS or weight.dim() != 2 or weight.device.type != "cpu":
        return weight
    if rows > 1:
        return weight if len(weight) % BLOCK else kept([weight], lambda: by_blocks(weight), "blocks")
    return weight if weight.is_contiguous() else kept([weight], weight.contiguous, "rows")
