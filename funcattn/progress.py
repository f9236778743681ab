"""Progress of slow operations: after two seconds a line on stderr, removed at the end.

    for window in track(windows, "reading"):        reading 12/40 #########.......... 9 s
    with waiting("compiling"):                      compiling, 5 s

Of nested operations the innermost is shown. Nothing is written where stderr is no terminal and
there is no notebook, under torch.compile, inside `silence()`, or where FUNCATTN_PROGRESS=0.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from .core.errors import printable

Item = TypeVar("Item")

PATIENCE = 2.0  # seconds before the first line
PAUSE = 0.2  # seconds between two lines
WIDTH = 24  # of the bar, in characters

_waits: list[object] = []  # operations in progress, the innermost last
_silences: list[object] = []


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The same items; shows progress once they have taken two seconds.

    Args:
        items: the items to iterate over.
        what: a word for the operation.
        total: the number of items, where `len(items)` is not defined.

    Example:
        >>> list(track([1, 2, 3], "counting"))
        [1, 2, 3]
    """
    if torch.compiler.is_compiling() or not watched():
        return items
    count = total if total is not None else len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
    return _told(items, what, count)


def _told(items: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
    begun = time.monotonic()
    due, told = begun + PATIENCE, False
    try:
        for n, item in enumerate(items):
            if (now := time.monotonic()) >= due:
                due, told = now + PAUSE, True
                _write(_line(what, n, total, now - begun))
            yield item
    finally:
        if told:
            _write("")


def _line(what: str, n: int, total: int | None, seconds: float) -> str:
    if not total:
        return f"{what} {n}, {seconds:.0f} s"
    full = WIDTH * min(n, total) // total
    return f"{what} {n}/{total} {'#' * full}{'.' * (WIDTH - full)} {seconds:.0f} s"


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show elapsed seconds while one call runs, once it has taken two."""
    if torch.compiler.is_compiling() or not watched():
        yield
        return
    over, begun, told, this = threading.Event(), time.monotonic(), False, object()

    def tell() -> None:
        nonlocal told
        pause = PATIENCE
        while not over.wait(pause):
            pause = 1.0
            if _waits[-1:] == [this] and not _silences:
                told = True
                _write(f"{what}, {time.monotonic() - begun:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    _waits.append(this)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        _waits.remove(this)
        if told:
            _write("")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Show no progress inside: for code that writes to stderr itself."""
    this = object()
    _silences.append(this)
    try:
        yield
    finally:
        _silences.remove(this)


def watched() -> bool:
    """True where stderr is a terminal, or in a notebook."""
    if _silences or os.environ.get("FUNCATTN_PROGRESS") == "0":
        return False
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", bool)())


def _write(line: str) -> None:
    print(f"\r{printable(line):<72}", end="" if line else "\r", file=sys.stderr, flush=True)
