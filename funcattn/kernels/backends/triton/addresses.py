"""Strides over broadcast leading axes, and block widths.

A tensor (*lead, A, B) that lacks a leading axis, or has it at size one, has a stride of zero there:
nothing is expanded or copied. Neighbouring axes are merged where the strides of every tensor allow.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..layout import has


class Axes(NamedTuple):
    """Leading axes and each tensor's strides over them."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # for each tensor

    @property
    def programs(self) -> int:
        """The number of elements over all axes."""
        return math.prod(self.sizes)


def axes(tensors: Sequence[Tensor | None], lead: Sequence[int], chosen: Sequence[int]) -> Axes:
    """Sizes and strides over the chosen axes (-1 is the last of lead), merged where possible.

    The tensors (*lead', A, B) broadcast to lead; None has strides of zero.

    Example:
        >>> import torch
        >>> axes([torch.empty(2, 3, 4, 5), torch.empty(3, 4, 5), torch.empty(2, 1, 4, 5)], (2, 3),
        ...     (-2, -1))
        Axes(sizes=(2, 3), strides=((60, 20), (0, 20), (20, 0)))
        >>> axes([torch.empty(2, 3, 4, 5)], (2, 3), (-2, -1))
        Axes(sizes=(6,), strides=((20,),))
    """
    sizes: list[int] = []
    strides: list[list[int]] = []
    before = 0
    for axis in sorted(chosen):
        size = lead[axis]
        if size == 1:
            continue
        here = [stride(x, axis) for x in tensors]
        if (
            sizes
            and before == axis - 1
            and all(old == new * size for old, new in zip(strides[-1], here, strict=True))
        ):
            sizes[-1], strides[-1] = sizes[-1] * size, here
        else:
            sizes.append(size)
            strides.append(here)
        before = axis
    return Axes(
        tuple(sizes), tuple(tuple(step[n] for step in strides) for n in range(len(tensors)))
    )


def stride(x: Tensor | None, axis: int) -> int:
    """The stride over a leading axis, 0 where the tensor lacks it."""
    return x.stride(axis - 2) if x is not None and has(x.shape, axis) else 0


def width(features: int) -> int:
    """The width of a block: the smallest power of two >= features, at least 16."""
    return max(16, 1 << (features - 1).bit_length())
