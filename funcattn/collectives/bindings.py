"""Which axes of a mesh are bound here, and to what.

    a process group      many processes, each with its own part               `shard_map` over a DeviceMesh
    a vmap               one process that holds all parts, stacked            `spmd`, and `shard_map` over a `sharding.Grid`
    nothing              one device: every collective is the identity

A binding belongs to the context (a contextvar): threads do not see each other's. Compiled code cannot read a contextvar (Dynamo,
torch 2.13), so bindings to process groups are mirrored in `_mirror`, a global that Dynamo guards: a function that was compiled
under one binding is compiled again under another. Threads that hold different process groups at a time cannot both compile.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _checks

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


_bound: ContextVar[tuple[Axis, ...]] = ContextVar("funcattn_axes", default=())
_cuts: ContextVar[tuple[tuple[tuple[str, ...], ...], ...]] = ContextVar("funcattn_cuts", default=())
_mirror: tuple[Axis, ...] = ()  # the process groups that are bound, for compiled code
_mirror_cuts: tuple[tuple[tuple[str, ...], ...], ...] = ()
_holders: dict[int, tuple[Axis, ...]] = {}  # by thread
_lock = threading.Lock()


def find(name: str) -> Axis | None:
    """The axis of that name, or None where it is not bound."""
    axes = _mirror if torch.compiler.is_compiling() else _bound.get()
    for axis in axes:
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
    """All axes that are bound here."""
    return _mirror if torch.compiler.is_compiling() else _bound.get()


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
        _checks.fail("binding", "axes", "of different names", names, "Give each axis of a mesh a name of its own.")
    with _held((*(axis for axis in _bound.get() if axis.name not in names), *axes)):
        yield


@contextmanager
def unbound(*names: str) -> Iterator[None]:
    """Hide axes: collectives over them are the identity inside."""
    with _held(tuple(axis for axis in _bound.get() if axis.name not in names)):
        yield


@contextmanager
def remembering(*cuts: Sequence[tuple[str, ...]]) -> Iterator[None]:
    """Remember of trees, leaf by leaf, which axes cut them: what `whole_lengths` needs to know."""
    global _mirror_cuts
    token, before = _cuts.set(tuple(tuple(cut) for cut in cuts)), _mirror_cuts
    _mirror_cuts = _cuts.get()
    try:
        yield
    finally:
        _cuts.reset(token)
        _mirror_cuts = before


def cuts_of(count: int) -> tuple[tuple[str, ...], ...]:
    """For each leaf of a tree of that many, the axes that cut it, as the tree among the arguments of shard_map of that size is cut.

    Raises:
        ValueError: there is no such tree, or several that are cut in different ways.
    """
    known = _mirror_cuts if torch.compiler.is_compiling() else _cuts.get()
    found = {cut for cut in known if len(cut) == count}
    if len(found) != 1:
        got = "none" if not found else "several, cut in different ways"
        remedy = "Give it to shard_map as an argument of its own."
        _checks.fail("norm", "the tree", f"like one argument of shard_map, of {count} leaves", got, remedy)
    return found.pop()


@contextmanager
def _held(axes: tuple[Axis, ...]) -> Iterator[None]:
    thread, before = threading.get_ident(), _holders.get(threading.get_ident(), ())
    _hold(thread, axes)
    token = _bound.set(axes)
    try:
        yield
    finally:
        _bound.reset(token)
        _hold(thread, before)


def _hold(thread: int, axes: tuple[Axis, ...]) -> None:
    global _mirror
    groups = tuple(axis for axis in axes if not axis.mapped)
    with _lock:
        _holders.pop(thread, None)
        if groups:
            _holders[thread] = groups
        kinds = set(_holders.values())
        if len(kinds) > 1:
            _holders.pop(thread)
            remedy = "Let one thread of a process hold a mesh at a time."
            _checks.fail("binding", "axes", "the process groups that another thread has bound", "others", remedy, RuntimeError)
        _mirror = next(iter(kinds), ())


def carried(f: F) -> F:
    """f with the bindings of now, whichever thread it runs in: autograd runs what CUDA computed in a thread of its own."""
    axes = bound()
    if not axes or torch.compiler.is_compiling():
        return f

    @functools.wraps(f)
    def run(*args: Any, **options: Any) -> Any:
        token = _bound.set(axes)
        try:
            return f(*args, **options)
        finally:
            _bound.reset(token)

    return run  # pyright: ignore[reportReturnType]
