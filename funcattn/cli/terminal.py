"""What is said to a person: on stderr, dim, one line; and text of models and of files shown so that it cannot steer a terminal.

What a model writes is shown without the characters that could (`errors.STEERING`), on a terminal; what comes from a file, such as
a name or an error, has them written out, everywhere.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console

from .. import progress
from ..core.errors import STEERING, printable

MISTAKE, INTERRUPTED, CUT_OFF = 2, 128 + 2, 128 + 13  # exit codes; the last two are a shell's for SIGINT and SIGPIPE
INVISIBLE = dict.fromkeys(STEERING)


def shown(text: str) -> str:
    """The text, on a terminal without what could steer it: a model is no more to be trusted than a file."""
    return text.translate(INVISIBLE) if sys.stdout.isatty() else text


def is_coloured() -> bool:
    """True where text on stdout may have colours: a terminal that has them, without NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str) -> str:
    """The text of an accepted draft, as it is shown: on a terminal in a colour."""
    return f"\x1b[36m{shown(text)}\x1b[39m" if text and is_coloured() else shown(text)


def report(prompt: str, reading: float, tokens: int, writing: float) -> None:
    """Tell the speed of reading and writing."""
    speed = f", {tokens / writing:.1f} tokens/s" if tokens else ""
    say(f"prefill: {prompt}, {reading:.2f} s; decode: {tokens} tokens, {writing:.2f} s{speed}")


def complain(about: object) -> int:
    """Tell a mistake in one line, and give its exit code."""
    print(printable(f"funcattn: {' '.join(str(about).split())}"), file=sys.stderr)
    return MISTAKE


def say(text: str) -> None:
    """Tell something on stderr."""
    Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True).print(printable(text), style="dim")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A line on stderr after one second, if it is a terminal; longer steps inside may replace it."""
    with progress.waiting(what):
        yield
