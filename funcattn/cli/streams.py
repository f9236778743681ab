"""Standard streams that are closed, full or cut off.

stdin closed       read as empty
stdout closed      an error at the first write, as where it is full
stderr closed      or full: messages are dropped, and the command continues
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Forgiving:
    """A stream for optional output: errors of writing are ignored."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write the text; drop it on an error."""
        with dropping(self.file):
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; drop the buffer on an error."""
        with dropping(self.file):
            self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """All three standard streams, whichever of them the process has."""
    # nothing can be written to what is closed
    ways = {"stdin": os.O_RDONLY, "stdout": os.O_RDONLY, "stderr": os.O_WRONLY}
    for name, way in ways.items():
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, way), "r" if name == "stdin" else "w"))
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            # a terminal that cannot show a letter shows that there is one
            file.reconfigure(errors="replace")
    with contextlib.redirect_stderr(Forgiving(sys.stderr)):  # pyright: ignore[reportArgumentType]
        yield


@contextlib.contextmanager
def dropping(file: TextIO) -> Iterator[None]:
    """Ignore errors of writing to a file in the block, and when the process ends."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: closed already
        end(file)


def end(file: TextIO) -> None:
    """Discard the buffer of a stream and all later writes."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def reason(error: OSError) -> str:
    """The message of a system error; it names stdout where it is of stdout."""
    try:
        sys.stdout.flush()
    except OSError as met:
        end(sys.stdout)
        return f"stdout cannot be written: {met.strerror}"
    return str(error) if error.filename else error.strerror or str(error)
