"""What was drafted and what was not, to look at: a text whose accepted drafts are marked.

print(transcript(stream(...), tokenizer))        the drafts that stayed stand in ‹ ›
transcript(stream(...), tokenizer)               in a notebook they are coloured
"""

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .decoding import Piece, Stats


@dataclass(frozen=True)
class Span:
    """A run of tokens of one round: their text, and whether they were drafted."""

    text: str
    drafted: bool


@dataclass(frozen=True)
class Transcript:
    """A text and how it came about: prints with the accepted drafts in ‹ ›, shows in a notebook with them coloured."""

    spans: tuple[Span, ...]
    stats: Stats

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(span.text for span in self.spans)

    def __str__(self) -> str:
        body = "".join(f"‹{span.text}›" if span.drafted else span.text for span in self.spans)
        return f"{body}\n{self._total()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = lambda text: html.escape(text).replace("\n", "<br>")
        mark = '<span style="background:rgba(59,110,165,.28);border-radius:3px;padding:1px 0">'
        body = "".join(f"{mark}{shown(span.text)}</span>" if span.drafted else shown(span.text) for span in self.spans)
        return f'<div style="line-height:1.6;max-width:48em;white-space:pre-wrap">{body}</div><p><small>{self._total()}</small></p>'

    def _total(self) -> str:
        stats = self.stats
        kept = f"{int(stats.accepted)} of {int(stats.drafted)} drafted tokens stayed ({float(stats.acceptance):.0%})"
        return f"{kept}; {float(stats.tokens_per_round):.2f} tokens a round in {int(stats.rounds)} rounds"


def transcript(pieces: Iterable[Piece], tokenizer: Any) -> Transcript:
    """Write a text to its end, and keep which of its tokens were drafted.

    Args:
        pieces: of `fa.speculation.stream`, a round each.
        tokenizer: what decodes.

    Raises:
        ValueError: no pieces.

    Law: the text is that of the tokens (test_transcripts.py).
    """
    spans: list[Span] = []
    told, before, accepted, last = "", 0, 0, None

    def add(text: str, drafted: bool) -> None:
        nonlocal told
        if new := text[len(told) :]:
            spans.append(Span(new, drafted))
            told = text

    for piece in pieces:
        new = len(piece.tokens) - before
        stayed = min(int(piece.stats.accepted) - accepted, new)  # the first of a round; what follows is the model's own
        for count, drafted in ((stayed, True), (new - stayed, False)):
            before += count
            if count:  # an unfinished character waits for the token that completes it
                add(tokenizer.decode(list(piece.tokens[:before])).rstrip("\ufffd"), drafted)
        accepted, last = int(piece.stats.accepted), piece
    if last is None:
        raise ValueError("transcript: pieces should be those of fa.speculation.stream, got none. Call it with steps of 1 or more.")
    add(tokenizer.decode(list(last.tokens)), False)
    return Transcript(tuple(spans), last.stats)
