"""How the fields of a weight lie when the weight is divided: a rule for a matrix (N, K) says what its codes and scales do.

    fields(weight, ("tensor", None))       rows over the axis "tensor"; of an int8 record that cuts codes and scale by rows

A division names, for each axis of the weight, the axes of a mesh that it is cut along, or None. A record registers its own way:
`@fields.register`; `sharding` does it for those of this library.
"""

import functools
from typing import Any

from torch import Tensor

from ..core import errors
from ..records import is_absent

Division = tuple[Any, ...]


@functools.singledispatch
def fields(weight: Any, division: Division) -> Any:
    """A tree like the weight whose leaves are divisions of its tensors.

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
