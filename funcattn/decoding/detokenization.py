"""The text of tokens that come one by one: what of it is certain, and where a stop string ends it.

A text is certain where no further token changes it. That is not every decoded text: a character may be unfinished, and bytes that
a tokenizer falls back to (`<0x0A>`) are decoded as one run, all of it U+FFFD where some of it is no UTF-8. So text is held back
until decoding says the same with a byte behind it. Decoders for which that suffices are listed (`STEPWISE`); with any other the
text comes at its end.

Law: what is given out, joined, is the decoded whole (test_detokenization.py).
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Decoders that look at one token, at its neighbour or at runs of bytes; and those that may stand behind one that joins all tokens.
STEPWISE = {"ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "CTC", "Fuse", "ByteFallback", "Strip", "Replace"}
BEHIND = {"Metaspace", "Fuse", "Strip", "Replace"}


class Decoding(NamedTuple):
    """How the text of tokens grows."""

    stepwise: bool  # by parts that can be told certain
    probe: tuple[int, ...]  # a token of a byte that no run ends well with


def decoding_of(tokenizer: Any) -> Decoding:
    """How the text of a tokenizer (ours or transformers') grows. One that only decodes is taken to decode bytes, as UTF-8."""
    found = (getattr(tokenizer, name, None) for name in ("backend", "backend_tokenizer"))
    backend = next((backend for backend in found if getattr(backend, "decoder", None) is not None), None)
    if backend is None:
        return Decoding(True, ())
    try:
        parts = _flat(json.loads(backend.decoder.__getstate__()))
    except Exception:  # a decoder in Python
        return Decoding(False, ())
    joined, stepwise = False, True
    for part in parts:
        stepwise = stepwise and part["type"] in (BEHIND if joined else STEPWISE)
        if joined and part["type"] == "Replace":
            stepwise = stepwise and len(part["pattern"].get("String", "--")) == 1
        if part["type"] == "Strip":  # of an end, the library fails on texts that are shorter than what it strips
            stepwise = stepwise and not part["stop"]
        joined = joined or part["type"] in ("Fuse", "ByteLevel")
    probe = ()
    if any(part["type"] == "ByteFallback" for part in parts):
        high = (backend.token_to_id(f"<0x{byte:02{letters}}>") for byte in range(0xFF, 0x7F, -1) for letters in "Xx")
        probe = tuple(id for id in high if id is not None)[:1]
    return Decoding(stepwise, probe)


class StreamedText:
    """A text in the making.

    Args:
        tokenizer: what decodes; None has no text.
        stop_strings: texts that end it. A special token is no part of the text, but stands in it where they are looked for.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, tuple(stop_strings)
        self.special = getattr(tokenizer, "special_tokens", {}) if self.stop_strings else {}
        self.decoding = decoding_of(tokenizer)
        self.ids: list[int] = []
        self.begin = self.read = 0  # text is decoded from begin, a place between tokens; that before read is known
        self.known = self.told = 0  # characters: of the text from begin to read; of the whole text up to read
        self.held, self.is_text = "", b""  # known and not given out; 1 for each character that is no special token's

    def add(self, token: int) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string was met, before which it ends."""
        if self.tokenizer is None:
            return "", False
        self.ids.append(token)
        if token in self.special:
            name, pending = self.special[token], self._pending()
            whole = self.held + pending + name
            ends = [whole.find(s, max(0, len(whole) - len(name) - len(s) + 1)) for s in self.stop_strings]
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
        """What was held back, once nothing can follow, up to a stop string."""
        if self.tokenizer is None:
            return ""
        self._hold(self.tokenizer.decode(self.ids)[self.told :], True)
        return self._given(min((place for s in self.stop_strings if (place := self.held.find(s)) >= 0), default=len(self.held)))

    def _pending(self) -> str:
        return self.tokenizer.decode(self.ids[self.begin :])[self.known :]

    def _advance(self) -> bool:
        """Hold the text of the tokens behind read, if it is certain."""
        if not self.decoding.stepwise:
            return False
        text = self.tokenizer.decode(self.ids[self.begin :])
        if text.endswith(UNFINISHED):
            return False
        probe = list(self.decoding.probe)
        if probe and not self.tokenizer.decode(self.ids[self.begin :] + probe).startswith(text):
            return False
        self._hold(text[self.known :], True)
        self.told += len(text) - self.known
        alone = len(self.tokenizer.decode(self.ids[self.read :]))
        if alone:  # what decoders do to the first token is done to one before read, now and later
            self.begin, self.known = self.read, alone
        else:
            self.known = len(text)
        self.read = len(self.ids)
        return True

    def _hold(self, text: str, is_text: bool) -> None:
        self.held += text
        self.is_text += bytes([is_text]) * len(text)

    def _given(self, place: int) -> str:
        """The text up to a place of what is held, which is held no longer."""
        given = "".join(letter for letter, is_text in zip(self.held[:place], self.is_text, strict=False) if is_text)
        self.held, self.is_text = self.held[place:], self.is_text[place:]
        return given


def text_of(tokenizer: Any, tokens: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
    """The text of tokens that are all there, up to the first stop string: as a stream would have given it."""
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
    """Length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
