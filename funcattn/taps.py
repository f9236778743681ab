"""Taps: named places in a computation where a value can be read, or replaced by another.

    x = tap("layers.0.output", x)          in the model: x itself outside of `listening`

A tap is the identity. Inside `listening(f)` every tap hands its name and value to f and goes on with what f returns. The listener
belongs to the thread and the context (a contextvar), and what it sees are the tracers of whatever transform is active, so what is
built on taps (`fa.trace`, `fa.patch`, calibration) is a pure function under grad, jvp and vmap. In compiled code taps are silent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .core.context import ContextValue

Listener = Callable[[str, Tensor], Tensor]

_listener: ContextValue[Listener | None] = ContextValue("taps", None)


def tap(name: str, x: Tensor) -> Tensor:
    """x, or what the listener puts in its place."""
    if torch.compiler.is_dynamo_compiling():
        return x
    listener = _listener.get()
    return x if listener is None or torch.compiler.is_compiling() else listener(name, x)


def listener() -> Listener | None:
    """What the taps here are handed to."""
    return None if torch.compiler.is_compiling() else _listener.get()


def heard() -> bool:
    """True inside `listening`, outside of compiled code."""
    return not torch.compiler.is_dynamo_compiling() and _listener.get() is not None and not torch.compiler.is_compiling()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hand every tap of this context to a function from a name and a value to the value to go on with; inner ones replace outer.

    Example:
        >>> with listening(lambda name, x: 2 * x):
        ...     tap("here", torch.ones(2))
        tensor([2., 2.])
    """
    with _listener.holding(listener):
        yield
