"""Taps: named points of a computation where a value can be read or replaced.

    x = tap("layers.0.output", x)          in the model: the identity outside of `listening`

Inside `listening(f)` every tap calls f with its name and value and returns the result. f is a
context variable (of the thread and context), and is called with the tracers of any active
transform, so functions built on taps (`fa.trace`, `fa.patch`, calibration) are pure functions under
grad, jvp and vmap. In compiled code taps are the identity.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .core.context import ContextValue

Listener = Callable[[str, Tensor], Tensor]

_listener: ContextValue[Listener | None] = ContextValue("taps", None)


def tap(name: str, x: Tensor) -> Tensor:
    """x, or the result of the listener."""
    if torch.compiler.is_dynamo_compiling():
        return x
    listener = _listener.get()
    return x if listener is None or torch.compiler.is_compiling() else listener(name, x)


def listener() -> Listener | None:
    """The function that taps of this context call, or None."""
    return None if torch.compiler.is_compiling() else _listener.get()


def heard() -> bool:
    """True inside `listening`, outside of torch.compile."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and _listener.get() is not None
        and not torch.compiler.is_compiling()
    )


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Make every tap of this context call listener(name, value) -> value; inner ones replace outer.

    Example:
        >>> with listening(lambda name, x: 2 * x):
        ...     tap("here", torch.ones(2))
        tensor([2., 2.])
    """
    with _listener.holding(listener):
        yield
