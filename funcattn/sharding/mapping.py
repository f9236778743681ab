"""shard_map and spmd: a function on every device of a mesh, each with its shards of the arguments.

    shard_map(f, mesh, in_specs, out_specs)     a DeviceMesh: this process is one of the devices
    shard_map(f, Grid(tensor=2), ...)           a Grid: all devices in this process, by vmap
    spmd(f, "tensor", 2, in_specs, out_specs)   the same, with one axis

Inside f values are plain tensors, each device's shard, and the axis names are bound: `psum` and the
other collectives communicate. So grad, vjp, jvp, vmap and their nestings go inside:
shard_map(grad(f)). A DTensor stores a value outside.

Source: JAX's shard_map (DESIGN note 14273).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import optree

from ..collectives import agree
from ..core import errors
from ..core.autograd import has_tangent, transforming
from ..core.doors import door
from ..models import Model
from ..tree import Tree
from .devices import bind, check, refuse_transform, stacked, wrapped
from .mesh import Grid, Mesh, P, PartitionSpec, Specs, axes_of, broadcast
from .models import sharded
from .storing import is_distributed, local, spec_of


@door
def spmd(
    f: Callable[..., Tree], axis: str, n: int, in_specs: Specs, out_specs: Specs
) -> Callable[..., Tree]:
    """f on n devices simulated by a vmap in this process, with a bound axis for collectives.

    It takes and returns whole values, and composes with every transform outside and inside.

    Args:
        f: a function of shards; positional arguments.
        axis: the axis name that f uses.
        n: number of devices.
        in_specs: one for each argument, each a prefix of its tree; or one spec for all.
        out_specs: a prefix of the tree that f returns.

    Example:
        >>> import torch
        >>> from funcattn.collectives import psum
        >>> spmd(lambda x: psum(x.sum(), "tensor"), "tensor", 2, P("tensor"), P())(torch.arange(4))
        tensor(6)

    Law: equals the function of one device, under every transform (test_sharding.py).
    """
    return shard_map(f, Grid(**{axis: n}), in_specs, out_specs)


@door
def shard_map(
    f: Any,
    mesh: Mesh,
    in_specs: Specs = None,
    out_specs: Specs = None,
    *,
    axes: Sequence[str] | None = None,
    check_alike: bool = True,
) -> Any:
    """f on every device of a mesh; or, for a Model, the same Model on sharded params.

    Args:
        f: a function of the shards of its positional arguments, or a Model (then see
            `models.sharded`; no specs).
        mesh: a DeviceMesh with names, or a Grid.
        in_specs: a tuple, one for each argument, each a prefix of its tree of `P`; or one P for
            all. None takes the specs of DTensors, and P() for other arguments.
        out_specs: a prefix of the tree that f returns. An unsharded result should be the same on
            every device.
        check_alike: whether arguments that are not DTensors, and unsharded results, are compared
            between processes, which costs one all_reduce of a few numbers, and two of each result.
            Over a Grid results always are.
        axes: the names that are bound in f; the other axes shard values, and f computes as if its
            shard were the whole. None is all.

    Returns:
        A function of whole values, or over a DeviceMesh of DTensors, or plain tensors that are the
        same on every process. It returns whole values over a Grid, and DTensors (also of unsharded
        results; see `gather`) over a DeviceMesh.

    Raises:
        TypeError: called inside a transform over a DeviceMesh: shard_map must be the outermost.
            Write shard_map(grad(f)).
        ValueError: specs that do not fit.

    Law: equals f of the whole (test_sharding.py; over processes, tests/distributed:
    test_processes_compute_what_one_device_does).
    """
    sizes = axes_of(mesh)
    if isinstance(f, Model):
        if in_specs is not None or out_specs is not None:
            errors.fail(
                "shard_map",
                "in_specs",
                "left out for a Model",
                "some",
                "A Model knows what its arguments are.",
            )
        return sharded(f, mesh)
    for name in axes or ():
        if name not in sizes:
            errors.fail(
                "shard_map",
                "axes",
                f"names of the mesh, {list(sizes)}",
                repr(name),
                "Name what f speaks over.",
            )
    if out_specs is None:
        errors.fail(
            "shard_map",
            "out_specs",
            "given",
            None,
            "Say how what f returns is cut; P() is not at all.",
        )
    seen = tuple(sizes) if axes is None else tuple(axes)

    @functools.wraps(f)
    def mapped(*args: object) -> Tree:
        whole: Tree = args
        flat, structure = optree.tree_flatten(whole)
        cuts = _in_specs(in_specs, args, flat)
        for leaf, spec in zip(flat, cuts, strict=True):
            check(leaf, spec, sizes)
        if isinstance(mesh, Grid):
            return stacked(f, mesh, flat, structure, cuts, out_specs, seen)
        if transforming() or has_tangent(flat):
            refuse_transform("shard_map")
        if check_alike:
            agree(
                "shard_map",
                {"arguments": [leaf for leaf in flat if not is_distributed(leaf)]},
                mesh=mesh,
            )
        parts = [local(leaf, spec, mesh) for leaf, spec in zip(flat, cuts, strict=True)]
        with bind(mesh, seen):
            out = f(*optree.tree_unflatten(structure, parts))
        return wrapped(out, mesh, out_specs, alike=check_alike)

    return mapped


def _in_specs(in_specs: Specs, args: tuple[Tree, ...], flat: list[Tree]) -> list[PartitionSpec]:
    if in_specs is None:
        return [spec_of(leaf) if is_distributed(leaf) else P() for leaf in flat]
    if not isinstance(in_specs, PartitionSpec) and (
        not isinstance(in_specs, tuple) or len(in_specs) != len(args)
    ):
        got = f"{len(in_specs)}" if isinstance(in_specs, tuple) else f"a {type(in_specs).__name__}"
        errors.fail(
            "shard_map",
            "in_specs",
            f"a tuple of {len(args)}, one for each argument, or one P",
            got,
            "Say P() for whole.",
        )
    return broadcast(in_specs, args)
