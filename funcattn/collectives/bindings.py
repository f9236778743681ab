"""Which axes of a mesh are bound here, and to what.

    a process group      many processes, each with its own part               `shard_map` over a DeviceMesh
    a vmap               one process that holds all parts, stacked            `spmd`, and `shard_map` over a `sharding.Grid`
    nothing              one device: every collective is the identity

A binding belongs to the context: threads do not see each other's, compiled or not, and a function that was compiled under one
binding is compiled again under another.
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

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh as it is bound: its size, and either a process group or a vmap."""

    name: str
    size: int
    rank: int = 0  # of this process; a vmap has all
    group: str = ""  # name of the process group; "" is a vmap
    level: int = 0  # of the vmap
    index: Tensor | None = field(default=None, compare=False)  # int64 (), each device's own under the vmap

    @property
    def mapped(self) -> bool:
        """Whether it is a vmap."""
        return not self.group


_bound: ContextValue[tuple[Axis, ...]] = ContextValue("axes", ())


def find(name: str) -> Axis | None:
    """The axis of that name, or None where it is not bound."""
    for axis in bound():
        if axis.name == name:
            return axis
    return None


def axis_size(name: str) -> int:
    """Devices along an axis; 1 where it is not bound.

    Example:
        >>> axis_size("tensor")
        1
    """
    axis = find(name)
    return 1 if axis is None else axis.size


def bound() -> tuple[Axis, ...]:
    """All axes that are bound here; to compiled code, the process groups."""
    axes = _bound.get()
    return tuple(axis for axis in axes if not axis.mapped) if torch.compiler.is_compiling() else axes


def simulated() -> bool:
    """Whether some axis is a vmap here."""
    return any(axis.mapped for axis in bound())


@contextmanager
def binding(*axes: Axis) -> Iterator[None]:
    """Bind axes in this context; an inner binding of a name hides the outer one.

    Raises:
        ValueError: a name is given twice.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) != len(names):
        errors.fail("binding", "axes", "of different names", names, "Give each axis of a mesh a name of its own.")
    with _bound.holding((*(axis for axis in _bound.get() if axis.name not in names), *axes)):
        yield


@contextmanager
def unbound(*names: str) -> Iterator[None]:
    """Hide axes: collectives over them are the identity inside."""
    with _bound.holding(tuple(axis for axis in _bound.get() if axis.name not in names)):
        yield


def carried(f: F) -> F:
    """f with the bindings of now, whichever thread it runs in: autograd runs what CUDA computed in a thread of its own."""
    axes = bound()
    if not axes or torch.compiler.is_compiling():
        return f

    @functools.wraps(f)
    def run(*args: Any, **options: Any) -> Any:
        with _bound.holding(axes):
            return f(*args, **options)

    return run  # pyright: ignore[reportReturnType]
