"""psum and the other collectives: the identity where the axis name is not bound.

Each is an autograd Function of a linear map (`operations`): its vjp is the transpose, its jvp the
map itself, and both are such Functions again. So grad, vjp, jvp, vmap and their nestings are exact,
whatever the axis is bound to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import Function

from ..core import errors
from ..core.autograd import Context, VmapInfo, closed_jvp, in_forward_mode, is_recorded
from . import groups
from .bindings import Axis, find
from .operations import (
    CopyToRegion,
    Gather,
    GatherInvariant,
    LocalSlice,
    Operation,
    Permute,
    Scatter,
    Sum,
)


def psum(x: Tensor, axis: str) -> Tensor:
    """The sum of x over the devices of an axis, replicated on all of them.

    The transpose is `copy_to_region`: a replicated result has a replicated cotangent, which is the
    cotangent of each device's x. x should vary between devices: of a replicated x the sum is a
    multiple.

    Args:
        x: of equal shape and dtype on every device.
        axis: name of a mesh axis. If it is not bound there is one device, and the sum is x.

    Example:
        >>> psum(torch.ones(2), "tensor")
        tensor([1., 1.])

    Law: grad, vjp, jvp, vmap and their nestings equal those of the sum (test_collectives.py).
    """
    return _move(x, Sum, axis)


def copy_to_region(x: Tensor, axis: str) -> Tensor:
    """x, replicated, as the input of computations that vary between devices; gradients are summed.

    The transpose of `psum`. The name is Megatron's; JAX's is pvary.

    Args:
        x: the same on every device of the axis.
        axis: name of a mesh axis; if it is not bound, or without derivatives, the result is x.
    """
    return _move(x, CopyToRegion, axis)


def all_gather(x: Tensor, axis: str, *, dim: int = 0) -> Tensor:
    """The x of all devices, concatenated along `dim`, for computations that vary between devices.

    The transpose is `reduce_scatter`.

    Args:
        x: of equal shape on every device.
        axis: name of a mesh axis. If it is not bound there is one device, and the result is x.
        dim: the axis of x.

    Returns:
        A tensor n times as long as x along dim, for n devices.
    """
    return _move(x, Gather, axis, _dim("all_gather", x, dim))


def reduce_scatter(x: Tensor, axis: str, *, dim: int = 0) -> Tensor:
    """Each device's shard, along `dim`, of the sum of x over devices, transpose of `all_gather`.

    Args:
        x: of equal shape on every device.
        axis: name of a mesh axis. If it is not bound there is one device, and the result is x.
        dim: the axis of x that is sharded.

    Raises:
        ValueError: the number of devices does not divide that axis of x.
    """
    dim = _dim("reduce_scatter", x, dim)
    _divides("reduce_scatter", x, axis, dim)
    return _move(x, Scatter, axis, dim)


def all_gather_invariant(x: Tensor, axis: str, *, dim: int = 0) -> Tensor:
    """`all_gather` whose result is replicated: its transpose is `local_slice` of the one cotangent.

    The name is JAX's.

    Args:
        x: of equal shape on every device.
        axis: name of a mesh axis. If it is not bound there is one device, and the result is x.
        dim: the axis of x.
    """
    return _move(x, GatherInvariant, axis, _dim("all_gather_invariant", x, dim))


def local_slice(x: Tensor, axis: str, *, dim: int = 0) -> Tensor:
    """Each device's shard, along `dim`, of a replicated x; the transpose of `all_gather_invariant`.

    Args:
        x: the same on every device of the axis.
        axis: name of a mesh axis. If it is not bound there is one device, and the result is x.
        dim: the axis of x that is sharded.
    """
    dim = _dim("local_slice", x, dim)
    _divides("local_slice", x, axis, dim)
    return _move(x, LocalSlice, axis, dim)


def ppermute(x: Tensor, axis: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Send x between devices by pairs (source, destination); devices without a source get zeros.

    Args:
        x: of equal shape on every device.
        axis: name of a mesh axis.
        pairs: each device at most once as a source and once as a destination; a ring is
            [(i, (i + 1) % n) for i in range(n)].

    Raises:
        ValueError: a device outside the axis, or twice on one side.
    """
    bound = find(axis)
    if bound is None:
        return x
    pairs = tuple((int(a), int(b)) for a, b in pairs)
    for side in ([a for a, _ in pairs], [b for _, b in pairs]):
        if len(set(side)) != len(side) or any(not 0 <= i < bound.size for i in side):
            remedy = "A device sends once and receives once."
            errors.fail(
                "ppermute",
                "pairs",
                f"of different devices 0..{bound.size - 1} on each side",
                list(pairs),
                remedy,
            )
    return _move(x, Permute, axis, pairs)


def axis_index(axis: str) -> Tensor:
    """The index of this device along an axis, int64 (); 0 if it is not bound.

    Args:
        axis: name of a mesh axis.
    """
    bound = find(axis)
    if bound is not None and bound.index is not None:
        return bound.index
    return torch.full((), 0 if bound is None else bound.rank, dtype=torch.int64)


def pmax(x: Tensor, axis: str) -> Tensor:
    """The maximum of x over the devices of an axis, not differentiable: detach x first.

    It raises where a derivative is taken.
    """
    bound = find(axis)
    if bound is None:
        return x
    if bound.mapped:
        return Greatest.apply(x, bound.index, bound)  # pyright: ignore[reportReturnType]
    if torch.compiler.is_compiling() or not is_recorded(x):
        return groups.all_reduce(x, bound.group, "max")
    return Greatest.apply(x, None, bound)  # pyright: ignore[reportReturnType]


def global_norms(lengths: Sequence[Tensor], axes: Sequence[Sequence[str]]) -> list[Tensor]:
    """The 2-norms of sharded tensors from those of this device's shards, each ().

    Args:
        lengths: the 2-norm of each shard, ().
        axes: for each tensor, the mesh axes that shard it.
    """
    out = [length * length for length in lengths]
    for name in dict.fromkeys(name for cut in axes for name in cut):
        places = [i for i, cut in enumerate(axes) if name in cut]
        summed = psum(torch.stack([out[i] for i in places]), name)
        for i, square in zip(places, summed.unbind(), strict=True):
            out[i] = square
    return [square.sqrt() for square in out]


def _dim(function: str, x: Tensor, dim: int) -> int:
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        errors.fail(
            function, "dim", f"an axis of x {errors.shape(x)}", dim, "Name one that is there."
        )
    return dim % x.dim()


def _divides(function: str, x: Tensor, axis: str, dim: int) -> None:
    bound = find(axis)
    if bound is not None and x.shape[dim] % bound.size:
        wanted = f"divisible by the {bound.size} devices of {axis!r} along axis {dim}"
        errors.fail(function, "x", wanted, errors.shape(x), "Pad it, or choose another axis.")


def _move(x: Tensor, kind: Any, name: str, *settings: object) -> Tensor:
    axis = find(name)
    if axis is None or (axis.size == 1 and not axis.mapped):
        return x
    if torch.compiler.is_compiling():
        if _traced_in_forward_mode():
            remedy = "Compile what is inside of jvp, or leave the jvp uncompiled."
            errors.fail(
                "collectives",
                "the call",
                "no compiled forward mode",
                "one",
                remedy,
                NotImplementedError,
            )
        return Traced.apply(x, kind(axis, *settings))  # pyright: ignore[reportReturnType]
    operation = kind(axis, *settings)
    if not axis.mapped and not is_recorded(x):
        return operation.across(x)
    return Moved.apply(x, axis.index, operation)  # pyright: ignore[reportReturnType]


def _traced_in_forward_mode() -> bool:
    """Whether a compile traces the inside of a jvp.

    Evaluated while tracing; Dynamo guards on the levels of torch.func.
    """
    return in_forward_mode()


# torch.compiler.assume_constant_result, without importing Dynamo
vars(_traced_in_forward_mode)["_dynamo_marked_constant"] = True


def _here(axis: Axis) -> bool:
    """In a vmap rule: whether the vmap is the one that the axis is bound to."""
    top = _functorch.peek_interpreter_stack()
    return axis.mapped and (0 if top is None else top.level()) + 1 == axis.level


class Moved(Function):
    """A linear map between devices as an autograd Function of x and the device index.

    The index is unused but mapped, so that the vmap of the axis calls the batching rule.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor | None, operation: Operation) -> Tensor:
        if operation.axis.mapped:
            remedy = "Call it inside of the function that spmd was given."
            errors.fail(
                "psum",
                "axis",
                f"{operation.axis.name!r} of a spmd that runs",
                "one that has ended",
                remedy,
                RuntimeError,
            )
        return operation.across(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operation = inputs[2]

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, None, None]:
        operation = ctx.operation.transposed()
        return Moved.apply(g, operation.axis.index, operation), None, None  # pyright: ignore[reportReturnType]

    @closed_jvp
    def jvp(ctx: Context, saved: list[Tensor], tangent: Tensor, *_: None) -> Tensor:
        return Moved.apply(tangent, ctx.operation.axis.index, ctx.operation)  # pyright: ignore[reportReturnType]

    @staticmethod
    def vmap(
        info: VmapInfo,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        index: Tensor | None,
        operation: Operation,
    ) -> tuple[Tensor, int | None]:
        dim = in_dims[0]
        x = x if dim is None else x.movedim(dim, 0)
        if _here(operation.axis):
            return operation.stacked(x, dim is None)
        return Moved.apply(
            x, index, operation if dim is None else operation.behind()
        ), None if dim is None else 0  # pyright: ignore


class Traced(Function):
    """`Moved` for compiled code, which refuses an autograd Function with a jvp."""

    @staticmethod
    def forward(x: Tensor, operation: Operation) -> Tensor:
        return operation.across(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operation = inputs[1]

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, None]:
        return Traced.apply(g, ctx.operation.transposed()), None  # pyright: ignore[reportReturnType]


class Greatest(Function):
    """The maximum over an axis, without a derivative."""

    @staticmethod
    def forward(x: Tensor, index: Tensor | None, axis: Axis) -> Tensor:
        return groups.all_reduce(x, axis.group, "max")

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Any:
        errors.fail(
            "pmax",
            "x",
            "detached",
            "one that is differentiated",
            "Pass x.detach().",
            NotImplementedError,
        )

    @staticmethod
    def jvp(ctx: Context, *tangents: object) -> Any:
        errors.fail(
            "pmax",
            "x",
            "detached",
            "one that is differentiated",
            "Pass x.detach().",
            NotImplementedError,
        )

    @staticmethod
    def vmap(
        info: VmapInfo, in_dims: tuple[int | None, ...], x: Tensor, index: Tensor | None, axis: Axis
    ) -> tuple[Tensor, int | None]:
        dim = in_dims[0]
        if _here(axis):
            return (x, None) if dim is None else (x.amax(dim), None)
        return Greatest.apply(x, index, axis), dim  # pyright: ignore[reportReturnType]
