"""Incremental detokenization: the prefix of the decoded text that no further token can change.

Decoding the tokens so far can give text that later tokens change: the last character may be
incomplete, and a run of byte tokens (`<0x0A>`) is decoded as one, all of it as U+FFFD where any of
it is invalid UTF-8. Text is therefore withheld until decoding gives the same text with a byte token
appended. The decoders for which this test suffices are listed (`STEPWISE`); with any other the
whole text is returned at the end.

Law: the pieces returned, joined, are the decoded text (test_detokenization.py).
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Decoders that read one token, its neighbour or runs of byte tokens; and those that may follow a
# decoder that joins all tokens.
STEPWISE = {
    "ByteLevel",
    "WordPiece",
    "Metaspace",
    "BPEDecoder",
    "CTC",
    "Fuse",
    "ByteFallback",
    "Strip",
    "Replace",
}
BEHIND = {"Metaspace", "Fuse", "Strip", "Replace"}


class Detokenizer(Protocol):
    """Decodes ids to text: a tokenizer of funcattn, of transformers, or another.

    A backend (`decoding_of`), `stop` and `special_tokens` are read where it has them.
    """

    def decode(self, ids: list[int], /) -> str:
        """The text of ids, special tokens left out."""
        ...


class Decoding(NamedTuple):
    """How the decoded text grows with its tokens."""

    stepwise: bool  # True where a prefix of the text can be known to be final
    probe: tuple[int, ...]  # a byte token that completes no valid run of bytes


def decoding_of(tokenizer: Detokenizer | None) -> Decoding:
    """How a tokenizer (funcattn's or transformers') decodes.

    A tokenizer of which only `decode` is known is assumed to decode bytes as UTF-8.
    """
    found = (getattr(tokenizer, name, None) for name in ("backend", "backend_tokenizer"))
    backend = next(
        (backend for backend in found if getattr(backend, "decoder", None) is not None), None
    )
    if backend is None:
        return Decoding(True, ())
    try:
        parts = _flat(json.loads(backend.decoder.__getstate__()))
    except Exception:  # a decoder written in Python
        return Decoding(False, ())
    joined, stepwise = False, True
    for part in parts:
        stepwise = stepwise and part["type"] in (BEHIND if joined else STEPWISE)
        if joined and part["type"] == "Replace":
            stepwise = stepwise and len(part["pattern"].get("String", "--")) == 1
        # Of Strip at the end: the library fails on texts shorter than what it strips.
        if part["type"] == "Strip":
            stepwise = stepwise and not part["stop"]
        joined = joined or part["type"] in ("Fuse", "ByteLevel")
    probe = ()
    if any(part["type"] == "ByteFallback" for part in parts):
        high = (
            backend.token_to_id(f"<0x{byte:02{letters}}>")
            for byte in range(0xFF, 0x7F, -1)
            for letters in "Xx"
        )
        probe = tuple(id for id in high if id is not None)[:1]
    return Decoding(stepwise, probe)


class StreamedText:
    """Decodes tokens one by one, and ends the text at a stop string.

    Args:
        tokenizer: decodes ids to text; None gives no text.
        stop_strings: texts that end it. Special tokens are not part of the text, but stop strings
            are searched in the text with them.
    """

    def __init__(self, tokenizer: Detokenizer | None, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, tuple(stop_strings)
        self.special = getattr(tokenizer, "special_tokens", {}) if self.stop_strings else {}
        self.decoding = decoding_of(tokenizer)
        self.ids: list[int] = []
        # Indices of tokens: text is decoded from begin on; the text of tokens before read is final.
        self.begin = self.read = 0
        # Characters of the text of tokens begin to read, and of the whole text up to read.
        self.known = self.told = 0
        # The final text not returned yet; per character, 0 where it is of a special token, else 1.
        self.held, self.is_text = "", b""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that became final, and whether a stop string was found; text ends before it."""
        if self.tokenizer is None:
            return "", False
        self.ids.append(token)
        if token in self.special:
            name, pending = self.special[token], self._pending()
            whole = self.held + pending + name
            ends = [
                whole.find(s, max(0, len(whole) - len(name) - len(s) + 1))
                for s in self.stop_strings
            ]
            if any(place >= 0 for place in ends):
                self._hold(pending, True)
                return self._given(min(place for place in ends if place >= 0)), True
            self._hold(name, False)
        elif self._advance():
            ends = [self.held.find(s) for s in self.stop_strings]
            if any(place >= 0 for place in ends):
                return self._given(min(place for place in ends if place >= 0)), True
        keep = max((_overlap(self.held, s) for s in self.stop_strings), default=0)
        return self._given(len(self.held) - keep), False

    def finish(self) -> str:
        """The withheld text up to a stop string, where no token follows."""
        if self.tokenizer is None:
            return ""
        self._hold(self._decode(self.ids)[self.told :], True)
        return self._given(
            min(
                (place for s in self.stop_strings if (place := self.held.find(s)) >= 0),
                default=len(self.held),
            )
        )

    def _decode(self, ids: list[int]) -> str:
        assert self.tokenizer is not None  # without one, add and finish return before
        return self.tokenizer.decode(ids)

    def _pending(self) -> str:
        return self._decode(self.ids[self.begin :])[self.known :]

    def _advance(self) -> bool:
        """Add the text of the tokens after `read` to the withheld text, if it is final."""
        if not self.decoding.stepwise:
            return False
        text = self._decode(self.ids[self.begin :])
        if text.endswith(UNFINISHED):
            return False
        probe = list(self.decoding.probe)
        if probe and not self._decode(self.ids[self.begin :] + probe).startswith(text):
            return False
        self._hold(text[self.known :], True)
        self.told += len(text) - self.known
        alone = len(self._decode(self.ids[self.read :]))
        if alone:  # decode from a token before read: decoders alter the first one
            self.begin, self.known = self.read, alone
        else:
            self.known = len(text)
        self.read = len(self.ids)
        return True

    def _hold(self, text: str, is_text: bool) -> None:
        self.held += text
        self.is_text += bytes([is_text]) * len(text)

    def _given(self, place: int) -> str:
        """Return the withheld text up to a position, and remove it from what is withheld."""
        given = "".join(
            letter
            for letter, is_text in zip(self.held[:place], self.is_text, strict=False)
            if is_text
        )
        self.held, self.is_text = self.held[place:], self.is_text[place:]
        return given


def text_of(
    tokenizer: Detokenizer | None, tokens: Sequence[int], stop_strings: Sequence[str] = ()
) -> str:
    """The text of all tokens up to the first stop string, as a stream gives it."""
    text, found = StreamedText(tokenizer, stop_strings), []
    for token in tokens:
        piece, ended = text.add(token)
        found.append(piece)
        if ended:
            return "".join(found)
    return "".join([*found, text.finish()])


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _flat(inner)]
    return [decoder]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of text that is a prefix of stop."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
