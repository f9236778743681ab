"""Running on all devices of a mesh: axes bound to process groups, or a vmap per axis."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import optree
import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.distributed.device_mesh import DeviceMesh

from ..collectives import Axis, binding, groups
from ..core import errors
from ..tree import Tree
from .mesh import Grid, PartitionSpec, Specs, axes_of, broadcast
from .storing import distributed


def refuse_transform(what: str) -> None:
    """Raise TypeError: a transform is active outside of a function that spans processes."""
    remedy = (
        f"{what} is the outermost: write shard_map(grad(f), ...), not grad(shard_map(f, ...)); or "
        "map over a Grid."
    )
    errors.fail(
        what, "the call", "outside of grad, vjp, jvp and vmap", "one inside", remedy, TypeError
    )


def bind(mesh: DeviceMesh, seen: Sequence[str]) -> AbstractContextManager[None]:
    """The context in which the axes of a DeviceMesh are bound to its process groups."""
    sizes = axes_of(mesh)
    return binding(
        *(
            Axis(
                name,
                sizes[name],
                rank=mesh.get_local_rank(name),
                group=mesh.get_group(name).group_name,
            )
            for name in seen
        )
    )


@contextlib.contextmanager
def inside(mesh: DeviceMesh) -> Iterator[None]:
    """Bind the axes of a DeviceMesh for a whole program on this process's shards.

    For functions that take whole trees, such as `fa.training.fit`: values are plain tensors, which
    `to_local` takes from DTensors.

    Replicated values are compared between processes (`collectives.agree`): tokens, keys, samplers,
    drafters and sizes at the beginning of each verb (generate, speculate, beam_search, score, fit,
    and loss on the CPU), whole trees by `shard`. Shards that each process has read or created are
    not compared, since they differ.
    """
    with bind(mesh, tuple(axes_of(mesh))):
        yield


def wrapped(out: Tree, mesh: DeviceMesh, out_specs: Specs, *, alike: bool) -> Tree:
    """The results of this process as DTensors; `alike` compares unsharded ones."""
    flat, structure = optree.tree_flatten(out)
    cuts = broadcast(out_specs, out)
    for x in flat:
        if not isinstance(x, Tensor):
            errors.fail(
                "shard_map",
                "results",
                "trees of tensors",
                f"a {type(x).__name__}",
                "Return torch.tensor(x).",
                TypeError,
            )
    if alike:
        for x, spec in zip(flat, cuts, strict=True):
            _check_over(x, spec, mesh)
    return optree.tree_unflatten(
        structure, [distributed(x, spec, mesh) for x, spec in zip(flat, cuts, strict=True)]
    )


def _check_over(x: Tensor, spec: PartitionSpec, mesh: DeviceMesh) -> None:
    """Compare minimum and maximum over all processes, so that every process raises alike."""
    wide = x.detach().double() if x.is_floating_point() else x.detach().long()
    for name, n in axes_of(mesh).items():
        if n > 1 and spec.cut(name) is None:
            group = mesh.get_group(name).group_name
            _compare(
                groups.all_reduce(wide, group, "max"),
                -groups.all_reduce(-wide, group, "max"),
                x.dtype,
                name,
            )


def check(leaf: object, spec: PartitionSpec, sizes: dict[str, int]) -> None:
    """Raise where a spec does not fit a leaf."""
    if not isinstance(leaf, Tensor):
        errors.fail(
            "shard_map",
            "arguments",
            "trees of tensors",
            f"a {type(leaf).__name__}",
            "Close f over it.",
            TypeError,
        )
    if len(spec) > leaf.dim():
        errors.fail(
            "shard_map",
            "in_specs",
            f"of at most {leaf.dim()} axes",
            repr(spec),
            f"The leaf is {errors.shape(leaf)}.",
        )
    for dim in range(len(spec)):
        n = 1
        for name in spec.names(dim):
            if name not in sizes:
                errors.fail(
                    "shard_map",
                    "specs",
                    f"of names of the mesh, {list(sizes)}",
                    repr(name),
                    "Name an axis that it has.",
                )
            n *= sizes[name]
        if leaf.shape[dim] % n:
            wanted = f"divisible into {n} parts along axis {dim}, as {spec} says"
            errors.fail(
                "shard_map", "a leaf", wanted, errors.shape(leaf), "Pad it, or keep it whole: P()."
            )


# All devices in one process.


def stacked(
    f: Callable[..., Tree],
    mesh: Grid,
    flat: list[Tensor],
    structure: optree.PyTreeSpec,
    cuts: list[PartitionSpec],
    out_specs: Specs,
    seen: Sequence[str],
) -> Tree:
    """f under one vmap for each axis of the mesh, the first outermost."""
    shaped: Any = None  # an optree.PyTreeSpec, of the results

    def device(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal shaped
        out = f(*optree.tree_unflatten(structure, list(leaves)))
        results, shaped = optree.tree_flatten(out)
        return tuple(results)

    run: Callable[..., Tree] = device
    for name, n in reversed(mesh.axes):
        run = _over(run, name, n, [spec.cut(name) is not None for spec in cuts], name in seen)
    results = run(*(_split(leaf, spec, mesh) for leaf, spec in zip(flat, cuts, strict=True)))
    whole = optree.tree_unflatten(shaped, list(results))
    specs = broadcast(out_specs, whole)
    return optree.tree_unflatten(
        shaped, [_join(x, spec, mesh) for x, spec in zip(results, specs, strict=True)]
    )


def _over(
    f: Callable[..., Tree], name: str, n: int, cut: list[bool], seen: bool
) -> Callable[..., Tree]:
    def device(index: Tensor, *leaves: Tensor) -> Tree:
        if not seen:
            return f(*leaves)
        level = _functorch.peek_interpreter_stack().level()
        with binding(Axis(name, n, level=level, index=index)):
            return f(*leaves)

    def run(*leaves: Tensor) -> Tree:
        where = leaves[0].device if leaves else None
        return torch.func.vmap(device, (0, *(0 if c else None for c in cut)))(
            torch.arange(n, device=where), *leaves
        )

    return run


def _split(x: Tensor, spec: PartitionSpec, mesh: Grid) -> Tensor:
    """The shards of all devices, stacked in front along the mesh axes that shard x."""
    done = 0
    for name, n in mesh.axes:
        dim = spec.cut(name)
        # outer axes of the mesh are outer in the spec: the remaining axis is split again
        if dim is not None:
            x = x.unflatten(done + dim, (n, -1)).movedim(done + dim, done)
            done += 1
    return x


def _join(x: Tensor, spec: PartitionSpec, mesh: Grid) -> Tensor:
    """The whole of results (*mesh, ...): shards concatenated, replicated ones checked."""
    left = len(mesh.axes)
    for name, _ in reversed(mesh.axes):
        left -= 1
        dim = spec.cut(name)
        if dim is None:
            _check_alike(x.select(left, 0), x, left, name)
            x = x.select(left, 0)
            continue
        later = sum(1 for other, _ in mesh.axes[:left])  # mesh axes still in front of the value
        x = x.movedim(left, later + dim).flatten(later + dim, later + dim + 1)
    return x


def _check_alike(first: Tensor, x: Tensor, dim: int, name: str) -> None:
    known, all_of_them = errors.value(first), errors.value(x)
    if known is not None and all_of_them is not None and x.shape[dim] > 1:
        _compare(known.unsqueeze(dim), all_of_them, x.dtype, name)


def _compare(one: Tensor, other: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise where replicated values differ in more than half of the digits (sums may reorder)."""
    if dtype.is_floating_point:
        near = torch.finfo(dtype).eps ** 0.5
        largest = float(one.abs().nan_to_num(0, 0, 0).amax()) if one.numel() else 0.0
        # 2.11 does not broadcast
        same = torch.isclose(one.expand_as(other), other, near, near * largest, equal_nan=True)
    else:
        same = one == other
    if not bool(same.all()):
        remedy = "Say P(name) where each has its own, or psum it."
        errors.fail(
            "shard_map",
            "a result that out_specs does not cut",
            f"the same on every device of {name!r}",
            "others",
            remedy,
        )
