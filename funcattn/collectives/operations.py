"""The linear maps between devices, each with its transpose, from which derivatives are composed.

    map               value on device i           input -> output          transpose
    Sum               y = sum_j x_j               varying -> replicated    CopyToRegion
    CopyToRegion      y_i = x                     replicated -> varying    Sum
    Gather            y_i = (x_0, x_1, ...)       varying -> varying       Scatter
    Scatter           y_i = part i of sum_j x_j   varying -> varying       Gather
    GatherInvariant   y = (x_0, x_1, ...)         varying -> replicated    LocalSlice
    LocalSlice        y_i = part i of x           replicated -> varying    GatherInvariant
    Permute           y_b = x_a for pairs (a, b)  varying -> varying       Permute, reversed

Permute gives zeros to a device without a source.

A replicated value has one replicated cotangent; a varying value has a cotangent per device. This
distinguishes Gather from GatherInvariant, and makes Sum and CopyToRegion each other's transpose.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3 (f and g); JAX's psum and pvary.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from . import groups
from .bindings import Axis

# The value of all devices and the axis that they are stacked along; None: replicated.
Stacked = tuple[Tensor, int | None]


class Operation(Protocol):
    """A linear map between the devices of an axis."""

    @property
    def axis(self) -> Axis:
        """The axis of the mesh."""
        ...

    def across(self, x: Tensor) -> Tensor:
        """This process's result from its x, by a collective of the process group."""
        ...

    def stacked(self, x: Tensor, alike: bool) -> Stacked:
        """The results of all devices from x (n, ...), stacked; from one x if alike (replicated)."""
        ...

    def transposed(self) -> "Operation":
        """The transpose, which maps cotangents."""
        ...

    def behind(self) -> "Operation":
        """The same map for values with one more axis in front."""
        ...


@dataclass(frozen=True)
class _Plain:
    axis: Axis

    def behind(self) -> Self:
        """The same map."""
        return self


@dataclass(frozen=True)
class _Along(_Plain):
    dim: int  # the axis of a value that is sharded

    def behind(self) -> Self:
        """The same map for values with one more axis in front."""
        return replace(self, dim=self.dim + 1)


@dataclass(frozen=True)
class Sum(_Plain):
    """See the module."""

    def across(self, x: Tensor) -> Tensor:
        """See Operation."""
        return groups.all_reduce(x, self.axis.group, "sum")

    def stacked(self, x: Tensor, alike: bool) -> Stacked:
        """See Operation."""
        return (x * self.axis.size if alike else x.sum(0, dtype=x.dtype)), None

    def transposed(self) -> "CopyToRegion":
        """See Operation."""
        return CopyToRegion(self.axis)


@dataclass(frozen=True)
class CopyToRegion(_Plain):
    """See the module."""

    def across(self, x: Tensor) -> Tensor:
        """See Operation."""
        return x.view_as(x)

    def stacked(self, x: Tensor, alike: bool) -> Stacked:
        """See Operation."""
        return (x.expand(self.axis.size, *x.shape) if alike else x.view_as(x)), 0

    def transposed(self) -> Sum:
        """See Operation."""
        return Sum(self.axis)


@dataclass(frozen=True)
class Gather(_Along):
    """See the module."""

    def across(self, x: Tensor) -> Tensor:
        """See Operation."""
        whole = groups.all_gather(
            x.movedim(self.dim, 0).contiguous(), self.axis.group, self.axis.size
        )
        return whole.movedim(0, self.dim)

    def stacked(self, x: Tensor, alike: bool) -> Stacked:
        """See Operation."""
        parts = x.expand(self.axis.size, *x.shape) if alike else x
        return parts.movedim(0, self.dim).flatten(self.dim, self.dim + 1), None

    def transposed(self) -> "Operation":
        """See Operation."""
        return Scatter(self.axis, self.dim)


@dataclass(frozen=True)
class Scatter(_Along):
    """See the module."""

    def across(self, x: Tensor) -> Tensor:
        """See Operation."""
        part = groups.reduce_scatter(
            x.movedim(self.dim, 0).contiguous(), self.axis.group, self.axis.size
        )
        return part.movedim(0, self.dim)

    def stacked(self, x: Tensor, alike: bool) -> Stacked:
        """See Operation."""
        total = x * self.axis.size if alike else x.sum(0, dtype=x.dtype)
        return total.unflatten(self.dim, (self.axis.size, -1)).movedim(self.dim, 0), 0

    def transposed(self) -> Gather:
        """See Operation."""
        return Gather(self.axis, self.dim)


@dataclass(frozen=True)
class GatherInvariant(Gather):
    """See the module."""

    def transposed(self) -> "LocalSlice":
        """See Operation."""
        return LocalSlice(self.axis, self.dim)


@dataclass(frozen=True)
class LocalSlice(_Along):
    """See the module."""

    def across(self, x: Tensor) -> Tensor:
        """See Operation."""
        return x.unflatten(self.dim, (self.axis.size, -1)).select(self.dim, self.axis.rank)

    def stacked(self, x: Tensor, alike: bool) -> Stacked:
        """See Operation."""
        if alike:
            return x.unflatten(self.dim, (self.axis.size, -1)).movedim(self.dim, 0), 0
        parts = x.unflatten(self.dim + 1, (self.axis.size, -1))
        return parts.diagonal(dim1=0, dim2=self.dim + 1).movedim(-1, 0), 0

    def transposed(self) -> GatherInvariant:
        """See Operation."""
        return GatherInvariant(self.axis, self.dim)


@dataclass(frozen=True)
class Permute(_Plain):
    """See the module."""

    pairs: tuple[tuple[int, int], ...]

    def across(self, x: Tensor) -> Tensor:
        """See Operation."""
        return groups.permute(x, self.axis.group, *groups.member(self.pairs, self.axis.rank))

    def stacked(self, x: Tensor, alike: bool) -> Stacked:
        """See Operation."""
        parts = (x.expand(self.axis.size, *x.shape) if alike else x).unbind(0)
        sources = [groups.member(self.pairs, i)[0] for i in range(self.axis.size)]
        return torch.stack([parts[a] if a >= 0 else torch.zeros_like(parts[0]) for a in sources]), 0

    def transposed(self) -> "Permute":
        """See Operation."""
        return replace(self, pairs=tuple((b, a) for a, b in self.pairs))
