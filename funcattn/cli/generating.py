"""`funcattn generate`: continue a text, with one or several samples side by side."""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.profiler import ProfilerActivity, profile

import funcattn as fa

from .. import drafters, progress, sampling, sharding, speculation
from ..core import atomic
from ..decoding.detokenization import text_of
from . import ranks, templating
from .sessions import Session, key_of, load, message, prompt_of, room, sampler_of
from .terminal import coloured, is_coloured, report, say, shown, working

COMPILED = 512  # the most tokens of a prompt that are read to compile: the chunk of stream
P = TypeVar("P", bound=fa.Streamed)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    with ranks.meshed(options) as mesh:
        if mesh is not None and options.prompt in (None, "-"):
            raise ValueError(
                "the prompt should be an argument, is to come from stdin, which "
                "processes cannot share. Write it out."
            )
        if templating.is_given(options) and not options.chat:
            raise ValueError(
                "--system, --tool-file and --template-arg are for conversations. Add --chat."
            )
        text, sampler = prompt_of(options), sampler_of(options)
        session = load(options, mesh)
        with contextlib.nullcontext() if mesh is None else sharding.inside(mesh):
            _write(options, session, text, sampler)


def _write(
    options: argparse.Namespace, session: Session, text: str, sampler: sampling.Sampler
) -> None:
    if options.chat:
        messages = (*templating.begun(options), message("user", text))
        ids = templating.prompt(options, session.tokenizer, messages)
    else:
        ids = session.tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty. Give some text, as an argument or on stdin.")
    steps = room(session, len(ids), options.steps)
    prompt = torch.tensor(ids, device=options.device)
    keys = fa.split(key_of(options), options.num_samples)
    if options.num_samples > 1:
        if options.speculate:
            raise ValueError(
                "drafts are for one text at a time. Leave out --num-samples or --speculate."
            )
        with profiled(options.profile):
            return _write_samples(session, prompt, keys, sampler, steps, options)
    if options.speculate:
        with profiled(options.profile):
            return _write_drafted(session, prompt, keys[0], sampler, steps, options)
    begin = lambda prompt, steps: fa.stream(
        *(keys[0], session.model, session.params, prompt),
        steps=steps,
        tokenizer=session.tokenizer,
        sampler=sampler,
        stop_strings=options.stop,
    )
    if options.compile:
        _compile(begin, prompt, steps)
    pieces = begin(prompt, steps)
    with profiled(options.profile):
        for _ in write(pieces, f"{len(ids)} tokens"):
            pass


def _compile(
    begin: Callable[[Tensor, int], Iterator[fa.Streamed]], prompt: Tensor, steps: int
) -> None:
    """Compile before the text begins, and report how long it took.

    Three pieces after the end of the prompt, with a cache of the final size, are computed and
    discarded.
    """
    started = time.perf_counter()
    end = prompt[-COMPILED:]
    with working("Compiling"):
        for _ in itertools.islice(begin(end, steps + len(prompt) - len(end)), 3):
            pass
    say(f"compiled in {time.perf_counter() - started:.1f} s")


@contextlib.contextmanager
def profiled(file: Path | None) -> Iterator[None]:
    """Write a profiler trace of the block to a file, if given; report ten slowest operations."""
    if file is None:
        yield
        return
    with atomic.file(file) as draft:  # fails before the computation where it cannot be written
        with profile(
            activities=[
                ProfilerActivity.CPU,
                *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
            ]
        ) as found:
            yield
        found.export_chrome_trace(str(draft))
    costliest = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)[:10]
    width = max((len(event.key) for event in costliest), default=0)
    for event in costliest:
        say(
            f"{event.key[:60]:<{min(width, 60)}}  {event.self_cpu_time_total / 1e3:9.1f} ms  "
            f"{event.count:6} calls"
        )
    say(f"trace in {file}")


def _write_drafted(
    session: Session,
    prompt: Tensor,
    key: Tensor,
    sampler: sampling.Sampler,
    steps: int,
    options: argparse.Namespace,
) -> None:
    """Write with drafts, and report their statistics."""
    model, N = fa.compile(session.model), options.draft_length
    if options.speculate == "lookup":
        drafter = drafters.prompt_lookup(length=N)
    else:
        with working("Quantizing the draft"):
            scheme = fa.int8 if options.speculate == "int8" else fa.int4(group=64)
            drafter = drafters.model(
                model, fa.quantize(scheme)(session.params), length=N, sampler=sampler
            )
    begin = lambda prompt, steps: speculation.stream(
        *(key, model, session.params, drafter, prompt),
        steps=steps,
        tokenizer=session.tokenizer,
        sampler=sampler,
        stop_strings=options.stop,
    )
    _compile(begin, prompt, steps)
    pieces = begin(prompt, steps)
    last, marks = None, speculation.Marks(session.tokenizer)

    def show(piece: speculation.Piece) -> str:
        return "".join(
            coloured(span.text) if span.drafted else shown(span.text) for span in marks.spans(piece)
        )

    for piece in write(pieces, f"{len(prompt)} tokens", show):
        last = piece
    if isinstance(last, speculation.Piece):
        say(f"{'drafts, coloured' if is_coloured() else 'drafts'}: {last.stats}")


def _write_samples(
    session: Session,
    prompt: Tensor,
    keys: Tensor,
    sampler: sampling.Sampler,
    steps: int,
    options: argparse.Namespace,
) -> None:
    """Prefill once, write all samples side by side, and print them separated by empty lines."""
    model, params, tokenizer = session.model, session.params, session.tokenizer
    started = time.perf_counter()
    with working("Reading the prompt"):
        past = (
            fa.generate(keys[0], model, params, prompt[:-1], steps=0)[1] if len(prompt) > 1 else ()
        )
    read = time.perf_counter()
    with working(f"Writing {len(keys)} samples"):
        go_on = lambda key: fa.generate(
            key, model, params, prompt[-1:], past, steps=steps, sampler=sampler, stop=tokenizer.stop
        )[0]
        rows = vmap(go_on)(keys).tolist()
    wrote = time.perf_counter()
    written = 0
    for number, row in enumerate(rows):
        ends = [place for place, token in enumerate(row) if token in tokenizer.stop]
        written += min(ends, default=steps - 1) + 1 if row else 0
        text = text_of(tokenizer, row[: min(ends, default=steps)], options.stop)
        print(shown(text), end="\n\n" if number < len(rows) - 1 else "\n")
    report(f"{len(prompt)} tokens", read - started, written, wrote - read)


def write(
    pieces: Iterator[P], prompt: str, show: Callable[[P], str] = lambda piece: shown(piece.text)
) -> Iterator[P]:
    """Print each piece and yield it; at the end, or after Ctrl-C, report the speed."""
    started = time.perf_counter()
    with working("Reading the prompt"):
        piece = next(pieces)
    read = time.perf_counter()
    try:
        while True:
            print(show(piece), end="", flush=True)
            yield piece
            if piece.ended:
                break
            # The text itself is on the terminal's current line.
            with progress.silence() if sys.stdout.isatty() else contextlib.nullcontext():
                piece = next(pieces)
    finally:
        if not isinstance(sys.exception(), OSError):  # stdout is closed or full
            print(flush=True)
            # the first token is part of prefill
            report(
                prompt, read - started, max(len(piece.tokens) - 1, 0), time.perf_counter() - read
            )
