"""shard and gather: a tree stored as shards in DTensors, and made whole again.

A DTensor here is storage: a shard and its placement. Nothing is computed on it (`shard_map` takes
the shards out): in torch 2.13 its operators lack forward mode, lose placements under grad, and
shift integers wrongly without an error.
"""

import functools
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import tree
from ..collectives import agree, groups
from ..core import errors
from ..core.autograd import has_tangent, transforming
from ..core.doors import door
from ..tree import Transform, Tree
from .mesh import Grid, Mesh, P, PartitionSpec, Rules, axes_of, part
from .rules import specs

if TYPE_CHECKING:  # importing it is a third of the import time of torch
    from torch.distributed.tensor import DTensor, Placement

NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)  # Gloo does not support these dtypes


@door
def shard(mesh: Mesh, rules: Rules | None = None) -> Transform:
    """A transform of a tree that keeps this process's shard of each leaf, as a DTensor.

    Every process should pass the same tree. Over a `Grid` the tree is returned unchanged after a
    check of the rules: all devices are in this process.

    Args:
        mesh: a DeviceMesh with names, or a Grid.
        rules: ordered pairs (regex of whole paths or predicate of (path, weight), spec); None is
            `tensor_parallel()`. With `tensor_parallel(config)` heads that do not divide raise here.

    Raises:
        ValueError: no rule matches a path, or sizes do not divide, or processes have different
            values:
            the error names the leaf.
        TypeError: not a mesh; a leaf of another mesh.

    Law: gather(shard(mesh)(tree)) == tree, bit for bit (tests/distributed:
    test_processes_write_what_one_device_does).
    Law: shard commutes with quantize where groups are not cut
        (test_sharding.py::test_sharding_commutes_with_quantizing).
    """
    sizes = axes_of(mesh)

    @door(name="shard(mesh)")
    def transform(params: Tree) -> Tree:
        cuts = specs(params, mesh, rules)
        if isinstance(mesh, Grid):
            return params
        if transforming() or has_tangent(params):
            errors.fail(
                "shard",
                "the call",
                "outside of every transform",
                "one inside",
                "Shard first.",
                TypeError,
            )
        agree(
            "shard",
            {path: leaf for path, leaf in tree.items(params) if not is_distributed(leaf)},
            mesh=mesh,
        )
        coordinates, of_processes = {name: mesh.get_local_rank(name) for name in sizes}, mesh

        def one(leaf: Tensor, spec: PartitionSpec) -> "DTensor":
            if is_distributed(leaf):
                if spec_of(leaf) == _trimmed(spec) and leaf.device_mesh == mesh:
                    return leaf
                remedy = "Gather it first: fa.gather(tree)."
                errors.fail(
                    "shard",
                    "tree",
                    "of whole tensors",
                    "a DTensor that is cut otherwise",
                    remedy,
                    TypeError,
                )
            held = part(leaf.detach(), spec, coordinates, sizes)
            return distributed(_copied(held), spec, of_processes, leaf.shape)

        return tree.map(one, params, cuts)

    return transform


@door
def gather(tree_: Tree) -> Tree:
    """The tree with every DTensor gathered on every process; other leaves are not copied.

    Args:
        tree_: any tree, on every process of the mesh.

    Raises:
        TypeError: inside a transform.
    """
    if transforming() or has_tangent(tree_):
        errors.fail(
            "gather",
            "the call",
            "outside of every transform",
            "one inside",
            "Use all_gather inside.",
            TypeError,
        )
    return tree.map(lambda leaf: _whole(leaf) if is_distributed(leaf) else leaf, tree_)


def to_local(tree_: Tree) -> Tree:
    """The tree with every DTensor replaced by its local shard, a plain tensor, for `inside`."""
    return tree.map(lambda leaf: leaf.to_local() if is_distributed(leaf) else leaf, tree_)


def is_distributed(leaf: object) -> "TypeGuard[DTensor]":
    """Whether a leaf is a DTensor."""
    return errors.is_distributed(leaf)


def spec_of(leaf: "DTensor") -> PartitionSpec:
    """The spec of a DTensor."""
    from torch.distributed.tensor import Replicate, Shard

    names = leaf.device_mesh.mesh_dim_names or ()
    found: list[tuple[str, ...]] = [()] * leaf.dim()
    for name, placement in zip(names, leaf.placements, strict=True):
        if isinstance(placement, Shard):
            found[placement.dim] = (*found[placement.dim], name)
        elif not isinstance(placement, Replicate):
            errors.fail(
                "shard_map", "a DTensor", "cut or whole", repr(placement), "Redistribute it first."
            )
    return _trimmed(
        P(*(None if not entry else entry[0] if len(entry) == 1 else entry for entry in found))
    )


def _trimmed(spec: PartitionSpec) -> PartitionSpec:
    """The same spec without trailing Nones, for comparison."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def placements(spec: PartitionSpec, mesh: DeviceMesh) -> "list[Placement]":
    """The DTensor placement for each axis of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    cuts = (spec.cut(name) for name in axes_of(mesh))
    return [Replicate() if dim is None else Shard(dim) for dim in cuts]


def from_local(parts: Tree, cuts: Tree, mesh: DeviceMesh) -> Tree:
    """DTensors from the shards of all processes, the inverse of `to_local`; cuts: their specs."""
    return tree.map(lambda held, spec: distributed(held, spec, mesh), parts, cuts)


def distributed(
    held: Tensor, spec: PartitionSpec, mesh: DeviceMesh, shape: torch.Size | None = None
) -> "DTensor":
    """This process's shard as a DTensor."""
    from torch.distributed.tensor import DTensor

    if shape is None:
        sizes = axes_of(mesh)
        times = [
            functools.reduce(lambda n, name: n * sizes[name], spec.names(dim), 1)
            for dim in range(held.dim())
        ]
        shape = torch.Size(n * size for n, size in zip(times, held.shape, strict=True))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        held, mesh, placements(spec, mesh), run_check=False, shape=shape, stride=stride
    )


def local(leaf: Tensor, spec: PartitionSpec, mesh: DeviceMesh) -> Tensor:
    """This process's shard of a DTensor, or of a plain tensor that is the same on every process."""
    if is_distributed(leaf):
        if leaf.device_mesh != mesh:
            errors.fail(
                "shard_map",
                "a DTensor",
                "of this mesh",
                f"one of {leaf.device_mesh}",
                "Gather it and shard it anew.",
            )
        if spec_of(leaf) != _trimmed(spec):
            remedy = "Shard it by the same rules, or leave in_specs out."
            errors.fail(
                "shard_map",
                "a DTensor",
                f"cut as in_specs says, {spec}",
                repr(spec_of(leaf)),
                remedy,
            )
        if torch.is_grad_enabled() and leaf.requires_grad:
            remedy = "Differentiate inside: shard_map(grad(f), ...)."
            errors.fail(
                "shard_map",
                "a DTensor",
                "one that autograd does not follow",
                "requires_grad",
                remedy,
                TypeError,
            )
        return leaf.to_local()
    sizes = axes_of(mesh)
    return part(leaf, spec, {name: mesh.get_local_rank(name) for name in sizes}, sizes)


def _copied(x: Tensor) -> Tensor:
    """A copy in the memory order of the original: `fa.load` stores matrices column-major."""
    by_columns = x.dim() == 2 and x.stride(0) == 1 and x.stride(1) != 1
    return (
        x.mT.clone(memory_format=torch.contiguous_format).mT
        if by_columns
        else x.clone(memory_format=torch.contiguous_format)
    )


def _whole(leaf: "DTensor") -> Tensor:
    spec, mesh = spec_of(leaf), leaf.device_mesh
    sizes, held = axes_of(mesh), leaf.to_local()
    bits = held.view(torch.uint8) if held.dtype in NARROW else held
    for dim in range(len(spec)):
        for name in reversed(spec.names(dim)):
            rows = bits.movedim(dim, 0).contiguous()
            bits = groups.all_gather(rows, mesh.get_group(name).group_name, sizes[name]).movedim(
                0, dim
            )
    return bits.view(held.dtype) if held.dtype in NARROW else bits.contiguous()
