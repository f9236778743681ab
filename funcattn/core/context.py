"""Values that hold inside a `with`: of the context for eager code, of the thread for compiled code.

A context variable is what eager code reads: threads and tasks have their own. Dynamo can neither read one nor guard on it, but it
does both with an attribute that each thread has for itself (threading.local). So a compiled function is compiled anew where a value
differs, and what one thread holds is never seen in another.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar

import torch

T = TypeVar("T")


class _OfThread(threading.local):
    """The values that a thread holds, one after the other, and the last of them."""

    def __init__(self, default: object) -> None:
        self.default = self.last = default
        self.held: tuple[list[object], ...] = ()  # a list of one each, which is known by its identity

    def push(self, entry: list[object]) -> None:
        self.held = (*self.held, entry)
        self.last = entry[0]

    def remove(self, entry: list[object]) -> None:
        self.held = tuple(other for other in self.held if other is not entry)
        self.last = self.held[-1][0] if self.held else self.default


class ContextValue(Generic[T]):
    """A value that `holding` sets for the time of a `with`.

    Law: when every `with` has been left, in whatever order, the value is the default again (test_context.py).

    Example:
        >>> name = ContextValue("name", "")
        >>> with name.holding("flash"):
        ...     name.get()
        'flash'
        >>> name.get()
        ''
    """

    every: ClassVar[list["ContextValue[Any]"]] = []  # of this process

    def __init__(self, name: str, default: T) -> None:
        self.every.append(self)
        self.default = default
        self._variable: ContextVar[tuple[list[T], ...]] = ContextVar(f"funcattn_{name}", default=())  # one after the other
        self._of_thread = _OfThread(default)

    def get(self) -> T:
        """The value here."""
        if torch.compiler.is_dynamo_compiling():  # the cheapest question that Dynamo answers
            return self._of_thread.last  # pyright: ignore[reportReturnType]
        held = self._variable.get()
        return held[-1][0] if held else self.default

    @contextmanager
    def holding(self, value: T) -> Iterator[None]:
        """Set the value inside of the `with`."""
        entry: list[Any] = [value]
        self._variable.set((*self._variable.get(), entry))
        self._of_thread.push(entry)
        try:
            yield
        finally:
            self._of_thread.remove(entry)
            self._variable.set(tuple(other for other in self._variable.get() if other is not entry))
