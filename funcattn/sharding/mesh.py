"""Which axis of a tensor is sharded over which axis of a mesh: a spec per leaf, rules for a tree.

    P("tensor", None)              rows over the axis "tensor", columns whole
    P("tensor", "data")            columns over "data" too
    P()                            replicated

A rule is a regular expression that must match the whole path of a weight, and a spec; the first
match applies, and a weight without a match raises. A quantized record follows the rule of the
weight that it represents: its codes and scales are sharded together.

Source: JAX's PartitionSpec; match_partition_rules of EasyLM.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..core import errors
from ..tree import Tree, Where


class PartitionSpec(tuple[str | tuple[str, ...] | None, ...]):
    """For each axis of a tensor a mesh axis that shards it, several (outer first), or None.

    Example:
        >>> PartitionSpec("tensor", None)
        P('tensor', None)
    """

    def __new__(cls, *axes: str | tuple[str, ...] | None) -> "PartitionSpec":
        for entry in axes:
            names = entry if isinstance(entry, tuple) else (entry,)
            if not all(name is None or isinstance(name, str) for name in names):
                remedy = "Write P('tensor', None), or P(('data', 'tensor'), None)."
                errors.fail(
                    "PartitionSpec",
                    "axes",
                    "names of mesh axes, tuples of them, or None",
                    repr(entry),
                    remedy,
                    TypeError,
                )
        used = [
            name
            for entry in axes
            for name in (entry if isinstance(entry, tuple) else (entry,))
            if name is not None
        ]
        if len(set(used)) != len(used):
            errors.fail(
                "PartitionSpec",
                "axes",
                "each name once",
                repr(axes),
                "An axis of a mesh cuts one axis of a tensor.",
            )
        return super().__new__(cls, axes)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"

    def names(self, dim: int) -> tuple[str, ...]:
        """The mesh axes that shard an axis of the tensor, outer first."""
        entry = self[dim] if dim < len(self) else None
        return () if entry is None else entry if isinstance(entry, tuple) else (entry,)

    def axes(self) -> tuple[str, ...]:
        """All mesh axes that shard the tensor."""
        return tuple(name for dim in range(len(self)) for name in self.names(dim))

    def cut(self, name: str) -> int | None:
        """The axis of the tensor that a mesh axis shards, or None."""
        return next((dim for dim in range(len(self)) if name in self.names(dim)), None)


P = PartitionSpec


@dataclass(frozen=True)
class VirtualMesh:
    """A mesh simulated in one process by vmap: names and sizes of axes, without process groups.

    Example:
        >>> Grid(data=2, tensor=3).shape
        (2, 3)
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, **axes: int) -> None:
        for name, size in axes.items():
            if not isinstance(size, int) or size < 1:
                errors.fail(
                    "Grid", name, "1 or more", size, "It is the number of devices along an axis."
                )
        object.__setattr__(self, "axes", tuple(axes.items()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in order."""
        return tuple(size for _, size in self.axes)


Grid = VirtualMesh
Mesh: TypeAlias = DeviceMesh | VirtualMesh  # a DeviceMesh has names


# What `broadcast` spreads over a tree: a PartitionSpec, or a tree of them that is a prefix of it.
Specs: TypeAlias = Tree


def axes_of(mesh: Mesh) -> dict[str, int]:
    """Name -> size of the axes of a mesh, outer first.

    Raises:
        TypeError: something else, or a DeviceMesh without names.
    """
    if isinstance(mesh, Grid):
        return dict(mesh.axes)
    names = getattr(mesh, "mesh_dim_names", None)
    if not names:
        remedy = (
            "Use torch.distributed.init_device_mesh('cpu', (2,), mesh_dim_names=('tensor',)), or "
            "fa.sharding.Grid(tensor=2)."
        )
        got = f"a {type(mesh).__name__}" + (
            " without names" if hasattr(mesh, "mesh_dim_names") else ""
        )
        errors.fail(
            "sharding",
            "mesh",
            "a DeviceMesh with mesh_dim_names, or a Grid",
            got,
            remedy,
            TypeError,
        )
    return {name: mesh.size(i) for i, name in enumerate(names)}


class Rule(NamedTuple):
    """path: a regex of whole paths or a predicate of (path, weight); spec; block: rows that stay
    together.
    """

    path: Where
    spec: PartitionSpec
    block: int = 1  # neighbouring rows on one device, such as the features of a head


Rules: TypeAlias = Sequence[Rule | tuple[Where, PartitionSpec]]


def is_spec(node: object) -> bool:
    """True for a PartitionSpec: `is_leaf` for functions of `fa.tree` over trees of specs."""
    return isinstance(node, PartitionSpec)


def pieces(spec: PartitionSpec, dim: int, sizes: dict[str, int]) -> int:
    """The number of shards along an axis of a tensor."""
    n = 1
    for name in spec.names(dim):
        n *= sizes[name]
    return n


def broadcast(prefix: Specs, whole: Tree, function: str = "shard_map") -> list[PartitionSpec]:
    """The spec of each leaf of `whole`; a spec in the prefix applies to all leaves below it."""
    try:
        return optree.broadcast_prefix(prefix, whole, is_leaf=is_spec)
    except ValueError as error:
        remedy = "Say P() for all that is whole, and use the records that the tree has."
        errors.fail(function, "specs", "prefixes of the trees", str(error).splitlines()[0], remedy)


def part(
    leaf: Tensor, spec: PartitionSpec, coordinates: dict[str, int], sizes: dict[str, int]
) -> Tensor:
    """The shard of a leaf on the device at these coordinates: a view."""
    return leaf[bounds(tuple(leaf.shape), spec, coordinates, sizes)]


def bounds(
    shape: tuple[int, ...], spec: PartitionSpec, coordinates: dict[str, int], sizes: dict[str, int]
) -> tuple[slice, ...]:
    """The slices of a leaf of this shape that the device at these coordinates stores."""
    found = []
    for dim, size in enumerate(shape):
        n, i = 1, 0
        for name in spec.names(dim):
            n, i = n * sizes[name], i * sizes[name] + coordinates[name]
        found.append(slice(i * (size // n), (i + 1) * (size // n)))
    return tuple(found)


def devices(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """The coordinates of every device, the last axis fastest."""
    shape = tuple(sizes.values())
    for flat in range(int(torch.Size(shape).numel())):
        found, rest = [], flat
        for size in reversed(shape):
            found.append(rest % size)
            rest //= size
        yield dict(zip(sizes, reversed(found), strict=True))
