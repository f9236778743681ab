"""`stream`: `generate` that yields each token's text as soon as it is final.

The tokens of a round are searched for stop strings before they are committed, so that the text, and
the cache with it, ends at the last token of a stop string, also in the middle of a draft
(`speculative.decoding.stream` is the same loop with another chooser).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import sampling
from ..caches import KVCache
from ..core import errors
from ..models import Model, Past
from ..records import ABSENT
from ..sampling import Sampler
from ..tree import Tree
from .detokenization import Detokenizer, StreamedText
from .loop import decode, drawing, prefill
from .requests import Request


@dataclass(frozen=True)
class Streamed:
    """A piece of a stream.

    text: what became final. tokens: all ids so far. cache: that of the text. ended: True for the
    last piece.
    """

    text: str
    tokens: tuple[int, ...]
    cache: KVCache
    ended: bool


def stream(
    key: Tensor,
    model: Model,
    params: Tree,
    prompt: Tensor,
    cache: Past = ABSENT,
    *,
    steps: int,
    tokenizer: Detokenizer | None = None,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    chunk: int = 512,
) -> Iterator[Streamed]:
    """`generate`, yielding text as it is written; the same key gives the same tokens.

    Text that may still change is withheld: an incomplete character, a run of bytes, or the
    beginning of a possible stop string (see `funcattn.decoding.detokenization`). A stop id and a
    stop string are not part of the text.

    Args:
        key, model, params, prompt, cache, steps, sampler, chunk: as in `generate`.
        tokenizer: decodes ids to text; without one, text is "".
        stop: ids that end the text; None takes the tokenizer's stop ids.
        stop_strings: texts that end it; the text ends before the first occurrence. One may be, or
            contain, a special token.

    Yields:
        A `Streamed` for each token; at least one, the last with `ended` True.

    Raises:
        ValueError, TypeError: as `generate`, at the first piece.

    Law: the tokens are those of `generate`, and the texts join to what `decode` gives for all of
        them, without a stop id (test_generation.py, test_detokenization.py).
    """
    check_stop_strings(tokenizer, stop_strings)
    ends = ends_of("stream", tokenizer, stop)
    request = Request("stream", model, params, prompt, cache, steps, sampler, ends, None, chunk)
    request = request.checked(key=key, stop_strings=tuple(stop_strings))
    heard = Heard(tokenizer, steps, ends, stop_strings)
    start = prefill(model, params, prompt, cache, room=steps, chunk=chunk)
    if not steps:
        yield Streamed("", (), start.cache, True)
    for text in decode(request, start, drawing(request, key), heard):
        yield Streamed(heard.new_text(), tuple(heard.tokens), text.cache, heard.ended)


class Heard:
    """A listener of `decode`: collects the tokens, the new final text, and whether the text ended.

    Args:
        tokenizer: decodes ids to text; None gives no text.
        steps: the most tokens of the text.
        stop: ids that end it and are no part of its text.
        stop_strings: texts that end it.
    """

    def __init__(
        self,
        tokenizer: Detokenizer | None,
        steps: int,
        stop: Collection[int],
        stop_strings: Sequence[str],
    ) -> None:
        self.text, self.steps, self.stop = StreamedText(tokenizer, stop_strings), steps, stop
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.ended = False

    def __call__(self, new: list[int]) -> tuple[int, bool]:
        """How many of these tokens are kept, and whether the text ends with the last of them."""
        for n, token in enumerate(new, 1):
            self._add(token)
            if self.ended:
                return n, True
        return len(new), False

    def new_text(self) -> str:
        """The text that became final since the last call."""
        piece = "".join(self.pieces)
        self.pieces.clear()
        return piece

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        is_end, found = token in self.stop, False
        if not is_end:
            piece, found = self.text.add(token)
            self.pieces.append(piece)
        self.ended = found or is_end or len(self.tokens) == self.steps
        if self.ended and not found:
            self.pieces.append(self.text.finish())


def check_stop_strings(tokenizer: Detokenizer | None, stop_strings: Sequence[str]) -> None:
    """Fail where stop strings are not a sequence of texts, or are given without a tokenizer."""
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        remedy = "Put a single one into a tuple; ids belong to stop."
        errors.fail(
            "stream",
            "stop_strings",
            "a sequence of texts, none of them empty",
            repr(stop_strings),
            remedy,
            TypeError,
        )
    if stop_strings and tokenizer is None:
        errors.fail(
            "stream",
            "tokenizer",
            "given with stop_strings",
            None,
            "Pass the tokenizer that fa.load returned.",
            TypeError,
        )


def ends_of(verb: str, tokenizer: Detokenizer | None, stop: Sequence[int] | None) -> Sequence[int]:
    """The ids that end a text: those given, else the tokenizer's."""
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        got = f"a {type(tokenizer).__name__}"
        errors.fail(
            verb,
            "tokenizer",
            "one that decodes",
            got,
            "Pass the tokenizer that fa.load returned.",
            TypeError,
        )
    if stop is None:
        return tuple(getattr(tokenizer, "stop", ()))
    return stop  # validated in Request.checked
