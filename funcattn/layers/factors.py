"""`Factors`: a weight of low rank, kept as the two matrices that it is the product of."""

from typing import NamedTuple

from torch import Tensor

from ..records import record
from .products import Weight, linear


@record
class Factors(NamedTuple):
    """rows (out, R) times columns (R, in): each a tensor, or a record of `linear`."""

    rows: Weight
    columns: Weight


@linear.register
def _(weight: Factors, x: Tensor) -> Tensor:
    return linear(weight.rows, linear(weight.columns, x))
