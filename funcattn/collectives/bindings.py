"""Which axes of a mesh are bound in this context, and to what.

    a process group      many processes, one shard each            `shard_map` over a DeviceMesh
    a vmap               one process with all shards, stacked      `spmd`; `shard_map` on a Grid
    nothing              one device: every collective is the identity

A binding is local to the context: threads do not see each other's bindings, compiled or not, and a
function compiled under one binding is recompiled under another.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import errors
from ..core.context import ContextValue

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Axis:
    """A bound axis of a mesh: its size, and either a process group or a vmap."""

    name: str
    size: int
    rank: int = 0  # of this process; unused for a vmap
    group: str = ""  # name of the process group; "" for a vmap
    level: int = 0  # vmap level
    # int64 (), the device index, mapped by the vmap
    index: Tensor | None = field(default=None, compare=False)

    @property
    def mapped(self) -> bool:
        """Whether the axis is bound to a vmap."""
        return not self.group


_bound: ContextValue[tuple[Axis, ...]] = ContextValue("axes", ())


def find(name: str) -> Axis | None:
    """The bound axis of this name, or None."""
    for axis in bound():
        if axis.name == name:
            return axis
    return None


def axis_size(name: str) -> int:
    """The number of devices along an axis; 1 if it is not bound.

    Example:
        >>> axis_size("tensor")
        1
    """
    axis = find(name)
    return 1 if axis is None else axis.size


def bound() -> tuple[Axis, ...]:
    """All axes bound in this context; in compiled code, those bound to process groups."""
    axes = _bound.get()
    return (
        tuple(axis for axis in axes if not axis.mapped) if torch.compiler.is_compiling() else axes
    )


def simulated() -> bool:
    """Whether some axis is bound to a vmap."""
    return any(axis.mapped for axis in bound())


@contextmanager
def binding(*axes: Axis) -> Iterator[None]:
    """Bind axes in this context; an inner binding of a name hides the outer one.

    Raises:
        ValueError: a name is given twice.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) != len(names):
        errors.fail(
            "binding",
            "axes",
            "of different names",
            names,
            "Give each axis of a mesh a name of its own.",
        )
    with _bound.holding((*(axis for axis in _bound.get() if axis.name not in names), *axes)):
        yield


@contextmanager
def unbound(*names: str) -> Iterator[None]:
    """Remove bindings: collectives over these axes are the identity inside the `with`."""
    with _bound.holding(tuple(axis for axis in _bound.get() if axis.name not in names)):
        yield


def carried(f: F) -> F:
    """f with the current bindings in every thread: CUDA backward passes run in another thread."""
    axes = bound()
    if not axes or torch.compiler.is_compiling():
        return f

    @functools.wraps(f)
    def run(*args: object, **options: object) -> Any:
        with _bound.holding(axes):
            return f(*args, **options)

    return run  # pyright: ignore[reportReturnType]
