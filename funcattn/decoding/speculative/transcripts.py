"""Transcripts of speculative decoding: the text, with accepted drafts marked.

print(transcript(stream(...), tokenizer))        accepted drafts in ‹ ›
transcript(stream(...), tokenizer)               in a notebook they are coloured
"""

import html
from collections.abc import Iterable
from dataclasses import dataclass

from ..detokenization import Detokenizer
from .decoding import Piece, Stats


@dataclass(frozen=True)
class Span:
    """A run of tokens of one round: their text, and whether they were drafted."""

    text: str
    drafted: bool


@dataclass(frozen=True)
class Transcript:
    """A text with its Stats: prints accepted drafts in ‹ ›, and colours them in a notebook."""

    spans: tuple[Span, ...]
    stats: Stats

    @property
    def text(self) -> str:
        """The text without marks."""
        return "".join(span.text for span in self.spans)

    def __str__(self) -> str:
        body = "".join(f"‹{span.text}›" if span.drafted else span.text for span in self.spans)
        return f"{body}\n{self.stats}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = lambda text: html.escape(text).replace("\n", "<br>")
        mark = '<span style="background:rgba(59,110,165,.28);border-radius:3px;padding:1px 0">'
        body = "".join(
            f"{mark}{shown(span.text)}</span>" if span.drafted else shown(span.text)
            for span in self.spans
        )
        return (
            f'<div style="line-height:1.6;max-width:48em;white-space:pre-wrap">{body}</div><p>'
            f"<small>{self.stats}</small></p>"
        )


class Marks:
    """Splits the text of each piece of a stream into drafted and not drafted.

    Args:
        tokenizer: the tokenizer of the stream.

    Law: the texts of the spans of a piece are the text of the piece (test_transcripts.py).
    """

    def __init__(self, tokenizer: Detokenizer):
        self.tokenizer = tokenizer
        # (end in the text, whether it was drafted) of each run of tokens not returned yet.
        self.runs: list[tuple[int, bool]] = []
        self.told = self.tokens = self.accepted = 0

    def spans(self, piece: Piece) -> tuple[Span, ...]:
        """The spans of the next piece; text that was withheld keeps the mark of its round."""
        new, accepted = len(piece.tokens) - self.tokens, int(piece.stats.accepted)
        # Accepted tokens come first in a round; the rest is sampled from the target.
        stayed = min(accepted - self.accepted, new)
        for count, drafted in ((stayed, True), (new - stayed, False)):
            self.tokens += count
            if count:  # an incomplete character is marked as the token that completes it
                self.runs.append(
                    (
                        len(
                            self.tokenizer.decode(list(piece.tokens[: self.tokens])).rstrip(
                                "\ufffd"
                            )
                        ),
                        drafted,
                    )
                )
        self.accepted = accepted
        spans, text, drafted = [], piece.text, False
        while text and self.runs:
            end, drafted = self.runs[0]
            now, text = text[: max(0, end - self.told)], text[max(0, end - self.told) :]
            self.told += len(now)
            if now:
                spans.append(Span(now, drafted))
            if self.told >= end:
                self.runs.pop(0)
        if text:
            self.told += len(text)
            spans.append(Span(text, False))
        return tuple(spans)


def transcript(pieces: Iterable[Piece], tokenizer: Detokenizer) -> Transcript:
    """Consume a stream, and mark which of its tokens were drafted.

    Args:
        pieces: of `fa.speculation.stream` with this tokenizer, one for each round.
        tokenizer: decodes ids to text.

    Raises:
        ValueError: no pieces.

    Law: the text is that of the tokens (test_transcripts.py).
    """
    spans: list[Span] = []
    marks, last = Marks(tokenizer), None
    for piece in pieces:
        spans += marks.spans(piece)
        last = piece
    if last is None:
        raise ValueError(
            "transcript: pieces should be those of fa.speculation.stream, got none. "
            "Call it with steps of 1 or more."
        )
    return Transcript(tuple(spans), last.stats)
