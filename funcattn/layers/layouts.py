"""How a division of a weight (N, K) over a mesh translates to the tensors of its record.

    fields(weight, ("tensor", None))    rows over "tensor"; of int8, codes and scales

A division names, for each axis of the weight, the mesh axes that it is sharded over, or None. A
record type registers an implementation with `@fields.register`; `sharding` does it for those of
this library.
"""

import functools
from typing import TypeAlias

from torch import Tensor

from ..core import errors
from ..records import is_absent
from ..tree import Tree
from .products import Weight

Division: TypeAlias = tuple[str | tuple[str, ...] | None, ...]


@functools.singledispatch
def fields(weight: Weight, division: Division) -> Tree:
    """A tree like the weight whose leaves are the divisions of its tensors.

    Args:
        weight: a tensor, or a record that registered.
        division: for each axis of the weight, the mesh axes that it is sharded over, or None.

    Raises:
        TypeError: a record that has not registered.
    """
    if is_absent(weight):
        return weight
    wanted = "a tensor or a record that registered itself with layers.fields"
    remedy = "Register it with @funcattn.layers.fields.register."
    errors.fail("fields", "weight", wanted, f"a {type(weight).__name__}", remedy, TypeError)


@fields.register
def _(weight: Tensor, division: Division) -> Division:
    return (*division, *(None,) * (weight.dim() - len(division)))
