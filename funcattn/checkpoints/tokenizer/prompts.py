"""Ids of a text rendered from messages, where only the template may write special tokens.

The origin of each character is known (`templates.render_with_origins`). A special token counts
where the template wrote all of it; between its first and last character may be a role (`<|` role
`|>`), in letters, digits, _ and -.

Where all special tokens of the text are such, its ids are those of the text. Any other must be
encoded as plain text, in place: so the tokenizer is copied with new spellings of its special
tokens, chosen so that they do not occur in the text; the template's tokens are respelled, others
are not. All rules of the tokenizer (spaces around tokens, the space before the first word,
normalization) then apply as before.
"""

import functools
import itertools
import json
from typing import NamedTuple, NoReturn

import tokenizers

from ...core.errors import fail
from ..families.tables import Json
from . import chunks
from .templates import Rendered

ROUNDS = 100  # of searching special tokens that appear only where another one is plain text
PLAIN = "x"  # replaces a character of a special token that is plain text


class Found(NamedTuple):
    """A special token that occurs in a text, and its position."""

    id: int
    begin: int
    end: int


class Respelled(NamedTuple):
    """A tokenizer with other spellings of its special tokens.

    spellings: id -> spelling, each beginning with `stem`.
    letters: ids of special tokens that are also the only spelling of a letter of plain text, and
        the ids that their new spellings have in `backend`.
    """

    backend: tokenizers.Tokenizer
    stem: str
    spellings: dict[int, str]
    letters: dict[int, int]

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """The ids of a text, and 1 for those that the tokenizer adds at the beginning or end.

        Raises:
            ValueError: the text has a letter whose only id is that of a special token.
        """
        encoded = chunks.encode(self.backend, text, add_special_tokens=add_special_tokens)
        if taken := self.letters.keys() & set(encoded.ids):
            _refuse(
                f"one whose special token {min(taken)} is the only id of a letter of plain text"
            )
        original = {there: here for here, there in self.letters.items()}
        return [original.get(number, number) for number in encoded.ids], encoded.mask


def special_of(backend: tokenizers.Tokenizer) -> dict[int, str]:
    """Id -> text of the special tokens."""
    return {
        number: token.content
        for number, token in backend.get_added_tokens_decoder().items()
        if token.special and token.content
    }


def encode(backend: tokenizers.Tokenizer, rendered: Rendered) -> list[int]:
    """The ids of a rendered text; the caller holds the lock of the backend.

    Raises:
        ValueError: a special token of unknown origin, or one that the tokenizer always writes for
            plain text.
    """
    text, special = rendered.text, special_of(backend)
    backend.encode_special_tokens = False
    seen = text
    for _ in range(ROUNDS):
        encoded = chunks.encode(backend, seen, add_special_tokens=False)
        found = _found(backend, encoded, seen, special)
        foreign = [
            token for token in found if not _is_written_by_template(token, rendered, special)
        ]
        if not foreign:
            break
        letters = list(seen)
        for place in (place for token in foreign for place in range(token.begin, token.end)):
            if rendered.origins[place] != ord("t"):
                letters[place] = PLAIN if letters[place] != PLAIN else "y"
        seen = "".join(letters)
    else:
        _refuse("more and more of them")
    if seen == text:
        return encoded.ids
    other = without(backend, text)
    parts, begin = [], 0
    for token in found:
        parts += [text[begin : token.begin], other.spellings[token.id]]
        begin = token.end
    ids, mask = other.encode("".join([*parts, text[begin:]]), add_special_tokens=False)
    unknown = unknown_of(backend)
    if _kept(backend, ids, mask, special) != [
        token.id for token in found if token.id not in unknown
    ]:
        _refuse("other special tokens than the template's")
    return ids


def encode_plain(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text as plain text, after the tokens that the tokenizer adds before it.

    The caller holds the lock of the backend.
    """
    backend.encode_special_tokens = True
    encoded = chunks.encode(backend, text, add_special_tokens=True)
    if special_of(backend).keys().isdisjoint(encoded.ids):
        return encoded.ids
    special = special_of(backend)
    if _found(backend, encoded, text, special):  # by the model itself, of plain characters
        ids, mask = without(backend, text).encode(text, add_special_tokens=True)
        if _kept(backend, ids, mask, special):
            _refuse("special tokens of plain text")
        return ids
    return encoded.ids


def _found(
    backend: tokenizers.Tokenizer, encoded: chunks.Encoded, text: str, special: dict[int, str]
) -> list[Found]:
    """Special tokens spelled in a text, and their positions.

    The unknown token counts only where it is spelled.
    """
    unknown, found = unknown_of(backend), []
    for number, offsets, added in zip(encoded.ids, encoded.offsets, encoded.mask, strict=True):
        if number in special and not added:
            begin, end = map(int, offsets)
            part = text[begin:end]
            # which a token may take in
            begin += len(part) - len(part.lstrip()) if not special[number][:1].isspace() else 0
            end -= len(part) - len(part.rstrip()) if not special[number][-1:].isspace() else 0
            if number not in unknown or text[begin:end] == special[number]:
                found.append(Found(number, begin, end))
    return found


def _kept(
    backend: tokenizers.Tokenizer, ids: list[int], mask: list[int], special: dict[int, str]
) -> list[int]:
    """The special tokens among the ids, but for the unknown one and those that the tokenizer puts
    first or last.
    """
    apart = unknown_of(backend)
    pairs = zip(ids, mask, strict=True)
    return [
        number for number, added in pairs if number in special and number not in apart and not added
    ]


def _is_written_by_template(token: Found, rendered: Rendered, special: dict[int, str]) -> bool:
    origins, text = (
        rendered.origins[token.begin : token.end],
        rendered.text[token.begin : token.end],
    )
    if b"?" in origins:
        remedy = (
            "Encode the conversation by hand: this template joins texts in a way that does not "
            "tell whose they are."
        )
        fail(
            "prompt",
            f"the special token {special[token.id]!r}",
            "the template's or a message's",
            "one of both",
            remedy,
        )
    whole = origins[:1] + origins[-1:] == b"tt" and b"d" not in origins
    return whole and all(
        origin == ord("t") or letter.isalnum() or letter in "_-"
        for letter, origin in zip(text, origins, strict=True)
    )


def unknown_of(backend: tokenizers.Tokenizer) -> set[int]:
    """The ids that the model writes for what it does not know: the named token, and what becomes of
    a noncharacter.
    """
    named = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
    try:
        found = {token.id for token in backend.model.tokenize("\U0010fffe")}
    except Exception:  # a model that knows all, or fails
        found = set()
    return found if named is None else {named, *found}


def without(backend: tokenizers.Tokenizer, text: str) -> Respelled:
    """The tokenizer with spellings of special tokens that do not occur in a text."""
    normal = (
        text.lower()
        if backend.normalizer is None
        else backend.normalizer.normalize_str(text).lower()
    )
    stems = (f"qzx{_letters(number, 6)}j" for number in itertools.count())
    stem = next(stem for stem in stems if stem not in text and stem not in normal)
    return _respelled(backend, stem, tuple(special_of(backend).items()))


@functools.lru_cache(maxsize=2)
def _respelled(
    backend: tokenizers.Tokenizer, stem: str, special: tuple[tuple[int, str], ...]
) -> Respelled:
    """A copy in which special tokens begin with `stem`.

    The copy's model makes no special token of plain text either: its vocabulary has them under
    their new spelling, and merges that would join to one are left out. A letter stays in the
    vocabulary, since plain text has no other id for it; the special token of the same text then
    has an id behind all others in the copy.
    """
    spellings = {number: f"{stem}{_letters(number, 10)}w" for number, _ in special}
    names = {token: spellings[number] for number, token in special}
    values = json.loads(backend.to_str())
    letters = {token for token in names if _is_only_spelling(values["model"], token)}
    added = values["added_tokens"]
    added.sort(key=lambda token: token["special"] and token["content"] in letters)  # stable
    for token in added:
        token["content"] = (
            names.get(token["content"], token["content"]) if token["special"] else token["content"]
        )
    _rename(values["model"], {token: name for token, name in names.items() if token not in letters})
    made = tokenizers.Tokenizer.from_str(json.dumps(values))
    ids = {number: made.token_to_id(spelling) for number, spelling in spellings.items()}
    moved = {number: ids[number] or -1 for number, token in special if token in letters}
    wrong = [token for number, token in special if token not in letters and ids[number] != number]
    if wrong:
        _refuse(f"another id for {wrong[0]!r} under another spelling")
    return Respelled(made, stem, spellings, moved)


def _is_only_spelling(model: dict[str, Json], token: str) -> bool:
    """True for a token that is one letter of the model's alphabet, without a byte fallback."""
    vocabulary = model["vocab"]
    known = vocabulary if isinstance(vocabulary, dict) else {name for name, _ in vocabulary}
    return (
        len(token) == 1
        and token in known
        and model["type"] in ("BPE", "Unigram")
        and not model.get("byte_fallback")
    )


def _rename(model: dict[str, Json], names: dict[str, str]) -> None:
    """Rename tokens of the model in a tokenizer.json."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:  # Unigram: pairs of token and score, by id
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if "merges" in model:
        pairs = (
            merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]
        )
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _letters(number: int, count: int) -> str:
    """A number in letters that no normalizer changes."""
    return "".join("abcdefghik"[int(digit)] for digit in f"{number:0{count}}")


def _refuse(got: str) -> NoReturn:
    remedy = (
        "Encode the conversation by hand: encode(text) for messages, encode(text, special=True) "
        "for what stands between."
    )
    fail("prompt", "the tokenizer", "one that tells special tokens from text", got, remedy)
