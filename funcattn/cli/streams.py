"""The streams of the command line where they are closed, full or cut off.

stdin closed       read as empty
stdout closed      an error when something is written, as where it is full
stderr closed      or full: what is said there is dropped, and the text goes on
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Forgiving:
    """A stream for optional output: what cannot be written is dropped."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        with dropping(self.file):
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        with dropping(self.file):
            self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """All three streams, whatever the process was given."""
    ways = {"stdin": os.O_RDONLY, "stdout": os.O_RDONLY, "stderr": os.O_WRONLY}  # nothing can be written to what is closed
    for name, way in ways.items():
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, way), "r" if name == "stdin" else "w"))
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")  # a terminal that cannot show a letter shows that there is one
    with contextlib.redirect_stderr(Forgiving(sys.stderr)):  # pyright: ignore[reportArgumentType]
        yield


@contextlib.contextmanager
def dropping(file: TextIO) -> Iterator[None]:
    """What cannot be written inside goes nowhere, now and when the process ends."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: closed already
        end(file)


def end(file: TextIO) -> None:
    """Have a stream, with what it still holds, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def reason(error: OSError) -> str:
    """What to say of an error of the system: that it is of stdout, where it is."""
    try:
        sys.stdout.flush()
    except OSError as met:
        end(sys.stdout)
        return f"stdout cannot be written: {met.strerror}"
    return str(error) if error.filename else error.strerror or str(error)
