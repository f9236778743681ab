"""Leaves from matrices in codes: each row of a record goes where a file of floats has that row.

Files have leaves fused, split by expert, with rows in another order, or transposed; `Pack.unpack`
says how. Applied to the numbers of rows in place of the rows, it says which rows make a leaf. Where
it does more than move rows, the matrices are dequantized.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .... import quantization
from ....layers import Weight
from ....transformer import Config
from ...families.weights import Source

MOVED = "its family stores more than rows in another order"
FLOATS = "its layer multiplies no records"
UNLIKE = "it is joined with matrices of other records"
OF_MATRIX = ("levels", "order")  # fields of a matrix, not of its rows


def placed(
    config: Config, source: Source, weights: Sequence[Weight], turned: bool
) -> list[Weight] | str:
    """The leaves of a source, made of rows of its records; or why they are none.

    Args:
        weights: the tensors of the source in the order of its names, of which one is a record.
        turned: True where the source has the transpose of the records.
    """
    if not all(map(quantization.is_multiplied, source.paths)):
        return FLOATS
    if not source.is_changed and not turned:
        return list(weights)
    turn = lambda x: x.mT if turned else x
    return _moved(weights, lambda rows: source.pack.unpack(config, [turn(x) for x in rows]))


def packed(config: Config, source: Source, weights: Sequence[Weight]) -> list[Weight] | str:
    """The other way: records of the tensors of a source, made of rows of its leaves; or why not."""
    return _moved(weights, lambda rows: source.pack.pack(config, rows))


def _moved(
    weights: Sequence[Weight], move: Callable[[list[Tensor]], list[Tensor]]
) -> list[Weight] | str:
    """Records of the rows that `move`, of matrices, makes of those of these records."""
    first = weights[0]
    if isinstance(first, Tensor) or any(not _are_alike(first, other) for other in weights):
        return UNLIKE
    numbers = _numbers(weights)
    places = move(numbers)
    last = sum(map(Tensor.numel, numbers)) - 1
    mirrored = move([last - x for x in numbers])
    for place, other in zip(places, mirrored, strict=True):
        if place.dtype != torch.int64 or place.dim() < 2 or place.shape[-1] != 1:
            return MOVED
        if not torch.equal(place, last - other):
            return MOVED
    made = [_gathered(weights, place.squeeze(-1)) for place in places]
    return UNLIKE if any(leaf is None for leaf in made) else made


def _are_alike(a: Weight, b: Weight) -> bool:
    """True for two records whose rows could be those of one."""
    if type(a) is not type(b):
        return False
    same = all(x.shape[-1] == y.shape[-1] and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
    return same and ("levels" not in a._fields or torch.equal(a.levels, b.levels))


def _numbers(weights: Sequence[Weight]) -> list[Tensor]:
    """A column (*lead, N, 1) for each record: the numbers of its rows among those of all."""
    found, first = [], 0
    for weight in weights:
        shape = weight.codes.shape[:-1]
        found.append(torch.arange(first, first + shape.numel()).reshape(*shape, 1))
        first += shape.numel()
    return found


def _gathered(weights: Sequence[Weight], place: Tensor) -> Weight | None:
    """The record of these rows (*lead, n), or None where their inputs are in several orders."""
    rows, first = place.flatten(), weights[0]

    def of_row(field: str) -> Tensor:
        parts = [getattr(weight, field).flatten(0, -2) for weight in weights]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[rows].reshape(*place.shape, -1)

    found = {field: of_row(field) for field in first._fields if field not in OF_MATRIX}
    if "levels" in first._fields:
        levels = first.levels.reshape(-1, first.levels.shape[-1])[0]
        found["levels"] = levels.expand(*place.shape[:-1], -1).contiguous()
    if "order" in first._fields:
        orders = torch.cat([weight.order.reshape(-1, weight.order.shape[-1]) for weight in weights])
        owner = _owners(weights)[place]  # the matrix of each row
        if (owner != owner[..., :1]).any() and (orders != orders[0]).any():
            return None
        found["order"] = orders[owner[..., 0]]
    return type(first)(**found)


def _owners(weights: Sequence[Weight]) -> Tensor:
    """For each row of all records the number of its matrix."""
    shapes = [weight.codes.shape for weight in weights]
    sizes = [shape[-2] for shape in shapes for _ in range(shape[:-2].numel())]
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def as_floats(weights: Sequence[Weight], turned: bool, dtype: torch.dtype) -> list[Tensor]:
    """The matrices, as a file of floats has them."""
    whole = lambda weight: weight if isinstance(weight, Tensor) else quantization.expand(weight)
    found = [whole(weight).to(dtype) for weight in weights]
    return [x.mT.contiguous() if turned else x for x in found]
