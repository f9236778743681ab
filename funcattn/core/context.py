"""Values set for the duration of a `with`: per context in eager code, per thread in compiled code.

Eager code reads a context variable, which threads and tasks do not share. Dynamo can neither read
one nor guard on it, but does both with a threading.local attribute. So a compiled function is
recompiled where a value differs, and the values of one thread are not visible in another.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar

import torch

T = TypeVar("T")


class _OfThread(threading.local):
    """The values set in this thread, innermost last, and the current one."""

    def __init__(self, default: object) -> None:
        self.default = self.last = default
        self.held: tuple[list[object], ...] = ()  # lists of one value, which are identified by id

    def push(self, entry: list[object]) -> None:
        self.held = (*self.held, entry)
        self.last = entry[0]

    def remove(self, entry: list[object]) -> None:
        self.held = tuple(other for other in self.held if other is not entry)
        self.last = self.held[-1][0] if self.held else self.default


class ContextValue(Generic[T]):
    """A value that `holding` sets for the duration of a `with`.

    Law: after every `with` has ended, in any order, the value is the default again
        (test_context.py).

    Example:
        >>> name = ContextValue("name", "")
        >>> with name.holding("flash"):
        ...     name.get()
        'flash'
        >>> name.get()
        ''
    """

    every: ClassVar[list["ContextValue[Any]"]] = []  # all instances in this process

    def __init__(self, name: str, default: T) -> None:
        self.every.append(self)
        self.default = default
        # The values set, innermost last.
        self._variable: ContextVar[tuple[list[T], ...]] = ContextVar(f"funcattn_{name}", default=())
        self._of_thread = _OfThread(default)

    def get(self) -> T:
        """The current value."""
        if torch.compiler.is_dynamo_compiling():  # the cheapest test that Dynamo evaluates
            return self._of_thread.last  # pyright: ignore[reportReturnType]
        held = self._variable.get()
        return held[-1][0] if held else self.default

    @contextmanager
    def holding(self, value: T) -> Iterator[None]:
        """Set the value inside the `with`."""
        entry: list[Any] = [value]
        self._variable.set((*self._variable.get(), entry))
        self._of_thread.push(entry)
        try:
            yield
        finally:
            self._of_thread.remove(entry)
            self._variable.set(tuple(other for other in self._variable.get() if other is not entry))
