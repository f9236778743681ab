"""`funcattn eval`: how well a model foretells a text.

    perplexity = exp(- mean log p(token))
    bits per byte = - sum log2 p(token) / bytes of these tokens

Perplexities compare models of one tokenizer, bits per byte all. The first token has nothing before
it and is not scored.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from .. import evaluation
from .arguments import number
from .sessions import Session, load
from .terminal import working

CONTEXT = 1024  # default; the cost of an evaluation grows with it


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    count = number(int, 1, 2**31, "1 or more")
    add = command.add_argument
    add("text", metavar="TEXT", help="a file of UTF-8, or - for stdin")
    add(
        "--context",
        metavar="T",
        type=count,
        help=f"tokens read at once ({CONTEXT}, or what the model can read)",
    )
    add(
        "--stride",
        metavar="N",
        type=count,
        help="tokens from one reading to the next (half of the context)",
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    text = (
        sys.stdin.read() if options.text == "-" else Path(options.text).read_text(encoding="utf-8")
    )
    session = load(options)
    with working("Encoding the text"):
        ids = torch.tensor(session.tokenizer.encode(text), device=options.device)
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens, and is scored from the second. Give a longer one."
        )
    limit = session.config.limit()
    context = options.context or min(CONTEXT, limit or CONTEXT)
    if limit is not None and context > limit:
        raise ValueError(
            f"--context should be at most the {limit} tokens that the model can read, got "
            f"{context}. Give a smaller one."
        )
    windows = evaluation.windows(len(ids), context=context, stride=options.stride)
    total = 0.0
    with torch.no_grad():
        for begin, first, end in _shown(windows):
            scores = evaluation.score_continuation(
                session.model, session.params, ids[begin:first], ids[first:end]
            )
            total -= float(scores.double().sum())
    scored, size = len(ids) - 1, _bytes(session, text, int(ids[0]))
    for name, value in (
        ("perplexity", f"{math.exp(total / scored):.4f}"),
        ("bits per byte", f"{total / math.log(2) / size:.4f}"),
        ("tokens", f"{scored:,} scored, of {size:,} bytes"),
        ("windows", f"{len(windows):,} of at most {context:,} tokens"),
    ):
        print(f"{name:<14} {value}")


def _bytes(session: Session, text: str, first: int) -> int:
    """Bytes of the text after its first token; a special token at the beginning has none."""
    begun = session.tokenizer.decode([first])
    return len((text.removeprefix(begun) if text.startswith(begun) else text).encode())


def _shown(windows: list[evaluation.Window]) -> Iterator[evaluation.Window]:
    """The windows, with a progress bar on stderr if it is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from windows
        return
    yield from track(windows, "Reading", console=console, transient=True)
