"""Messages on stderr, dim and of one line; text of models and files without control characters.

A model's text is shown on a terminal without the characters in `errors.STEERING`; text from a file,
such as a name or an error, has them escaped, everywhere.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console

from .. import progress
from ..core.errors import STEERING, printable

# exit codes; the last two are a shell's for SIGINT and SIGPIPE
MISTAKE, INTERRUPTED, CUT_OFF = 2, 128 + 2, 128 + 13
INVISIBLE = dict.fromkeys(STEERING)


def shown(text: str) -> str:
    """The text; on a terminal without control characters, since a model's output is untrusted."""
    return text.translate(INVISIBLE) if sys.stdout.isatty() else text


def is_coloured() -> bool:
    """True where stdout is a terminal with colours, and NO_COLOR is unset (no-color.org)."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def coloured(text: str) -> str:
    """The text of an accepted draft, coloured on a terminal."""
    return f"\x1b[36m{shown(text)}\x1b[39m" if text and is_coloured() else shown(text)


def report(prompt: str, reading: float, tokens: int, writing: float) -> None:
    """Print the speed of prefill and decoding."""
    speed = f", {tokens / writing:.1f} tokens/s" if tokens else ""
    say(f"prefill: {prompt}, {reading:.2f} s; decode: {tokens} tokens, {writing:.2f} s{speed}")


def complain(about: object) -> int:
    """Print an error in one line, and return its exit code."""
    print(printable(f"funcattn: {' '.join(str(about).split())}"), file=sys.stderr)
    return MISTAKE


def say(text: str) -> None:
    """Print a message on stderr."""
    Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True).print(
        printable(text), style="dim"
    )


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A line on stderr after one second, if it is a terminal; operations inside may replace it."""
    with progress.waiting(what):
        yield
