"""What is said to a person: on stderr, dim, one line; and text of a model shown so that it cannot steer a terminal."""

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console

MISTAKE, INTERRUPTED, CUT_OFF = 2, 128 + 2, 128 + 13  # exit codes; the last two are a shell's for SIGINT and SIGPIPE
INVISIBLE = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")})  # what could steer a terminal


def shown(text: str) -> str:
    """The text, on a terminal without what could steer it: a model is no more to be trusted than a file."""
    return text.translate(INVISIBLE) if sys.stdout.isatty() else text


def report(prompt: str, reading: float, tokens: int, writing: float) -> None:
    """Tell the speed of reading and writing."""
    speed = f", {tokens / writing:.1f} tokens/s" if tokens else ""
    say(f"prefill: {prompt}, {reading:.2f} s; decode: {tokens} tokens, {writing:.2f} s{speed}")


def complain(about: object) -> int:
    """Tell a mistake in one line, and give its exit code."""
    print(f"funcattn: {' '.join(str(about).split())}", file=sys.stderr)
    return MISTAKE


def say(text: str) -> None:
    """Tell something on stderr."""
    Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True).print(text, style="dim")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr, where somebody looks at it."""
    console = Console(stderr=True)
    with console.status(f"[dim]{what.replace('[', chr(92) + '[')}") if console.is_terminal else contextlib.nullcontext():
        yield
