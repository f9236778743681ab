"""`funcattn chat`: a conversation whose cache is kept from turn to turn."""

import argparse
import contextlib
import dataclasses
import sys

import torch

import funcattn as fa

from .. import caches, sampling, tree
from . import templating
from .generating import write
from .sessions import Session, key_of, load, message, room, sampler_of, utf8
from .terminal import complain, say

HELP = "/undo takes the last turn back, /new begins again; Ctrl-C stops an answer, Ctrl-D leaves."


@dataclasses.dataclass(frozen=True)
class Talk:
    """The messages, and a cache of the tokens `ids`; it is truncated where the tokens differ.

    A cache with recurrent states cannot be truncated: the text is then read again.
    """

    past: fa.caches.KVCache
    ids: tuple[int, ...] = ()
    messages: tuple[dict[str, str], ...] = ()


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    sampler = sampler_of(options)
    session = load(options)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits and remembers lines once it is there)
        say(f"{options.model}. {HELP}")
    talk = begun = Talk(_empty(session, options), messages=templating.begun(options))
    while True:
        try:
            text = utf8(input("> " if interactive else "").strip())
        except EOFError:
            return print() if interactive else None
        except KeyboardInterrupt:
            say("\nCtrl-D leaves.")
            continue
        if text == "/new":
            talk = begun
            say("A new conversation.")
        elif text == "/undo":
            kept = max(len(talk.messages) - 2, len(begun.messages))
            talk = dataclasses.replace(talk, messages=talk.messages[:kept])
            say(f"turns left: {len(talk.messages) // 2}")
        elif text.startswith("/") and interactive:
            say(HELP)
        elif text:
            try:
                talk = _answer(session, talk, text, sampler, options)
            except ValueError as error:
                if not interactive:
                    raise
                complain(error)


def _empty(session: Session, options: argparse.Namespace) -> fa.caches.KVCache:
    return tree.to(options.device)(session.model.cache(0, dtype=session.dtype))


def _answer(
    session: Session, talk: Talk, text: str, sampler: sampling.Sampler, options: argparse.Namespace
) -> Talk:
    """Write the answer to a text; Ctrl-C keeps the tokens written so far."""
    messages = (*talk.messages, message("user", text))
    wanted = templating.prompt(options, session.tokenizer, messages)
    steps = room(session, len(wanted), options.steps)
    alike = (a == b for a, b in zip(talk.ids, wanted[:-1], strict=False))
    known = next(
        (place for place, same in enumerate(alike) if not same), min(len(talk.ids), len(wanted) - 1)
    )
    if known < len(talk.ids) and caches.states(talk.past):
        known, past = 0, _empty(session, options)
    else:
        past = caches.with_length(talk.past, torch.full_like(talk.past.length, known))
    past = caches.grow(past, max(0, len(wanted) + steps - caches.capacity(past)))
    pieces = fa.stream(
        *(fa.fold_in(key_of(options), len(messages)), session.model, session.params),
        *(torch.tensor(wanted[known:], device=options.device), past),
        steps=steps,
        tokenizer=session.tokenizer,
        sampler=sampler,
        stop_strings=options.stop,
    )
    said, last = "", None
    with contextlib.suppress(KeyboardInterrupt):
        for last in write(pieces, f"{len(wanted) - known} tokens behind a past of {known}"):
            said += last.text
    if last is None:
        return talk  # no tokens were written: drop the question
    # a stream writes behind the past that it is given
    assert isinstance(last.cache, (caches.Branch, caches.Grouped, caches.Hybrid))
    past = caches.flatten(last.cache)
    return Talk(
        past, (*wanted, *last.tokens)[: int(past.length)], (*messages, message("assistant", said))
    )
