"""Bounds on memory and time of a tokenizer.json, checked before `tokenizers` reads it.

The `tokenizers` library, in Rust, aborts the process when out of memory, which Python cannot catch.
A text passes a pipeline: normalizer, pre-tokenizer, model, post-processor; ids pass the decoder.
Every component must be of a kind in the tables here, which have the most bytes that it makes of one
byte; the product along the pipeline is bounded, and so are ids, tokens and their number. Where the
product and a text are both large, parts of the text are normalized and measured first.

A regular expression may search the rest of a text from every position. The library gives up one
match after ten million steps, but not a thousand of them. So patterns are first timed on the
beginning and end of a text, on four times as much each time, until all is done or one is far too
slow.

Source: github.com/huggingface/tokenizers, tokenizers/src, version 0.23; Unicode forms grow a text
    by 18 at most, once.
"""

import base64
import binascii
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import tokenizers

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json
from ..regular_files import parse_object

# of a vocabulary: the library makes a list up to the largest id; 262 144 are the most seen
MOST_IDS = 2**22
MOST_ADDED = 2**17  # tokens beside the model's; some families have 65 536 for images
LONGEST = 2**12  # letters of a token or of a text that a component puts in; 512 are the most seen
LONGEST_PATTERN = 2**12
MOST_COMPONENTS = 64  # of one part of the pipeline
MOST_ENDS = 2**8  # tokens that a post-processor puts around a text
GROWTH, PRE_GROWTH, DECODED_GROWTH = 2**12, 2**4, 2**6  # bytes for one byte
# letters that are normalized at once without a look at what becomes of them; 16 bytes of memory
# each
MEASURED = 2**22
ADDED_SIZE = 2**24  # letters that all added tokens become
# letters of a text that patterns try first, and how many times more are next
FIRST_WINDOW, LATER_WINDOW = 16, 4
# seconds of this thread for any window, and more for each letter; a usual pattern takes 5e-7
SLOW = 0.25, 2e-5
COUNTED = re.compile(r"(?<!\\[xuo])\{(\d*),?(\d*)\}")
# the product of all counts in a pattern: a larger one hides behind it what it costs
MOST_COUNTED = 2**8

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
EVERY_LETTER = r"[\s\S]"
# patterns whose every match ends soon, so that none is tried first
TRUSTED = {LLAMA3, QWEN2, EVERY_LETTER}

UNCHANGED = 1
NORMALIZERS = {
    **dict.fromkeys(
        ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Strip", "StripAccents"), UNCHANGED
    ),
    "BertNormalizer": 2,  # spaces around each Chinese character
    "ByteLevel": 2,
}
PRE_TOKENIZERS = {
    **dict.fromkeys(
        ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"), UNCHANGED
    ),
    **dict.fromkeys(("CharDelimiterSplit", "UnicodeScripts", "FixedLength", "Split"), UNCHANGED),
    "ByteLevel": 2,
    "Metaspace": 4,  # one letter of four bytes for a space
}
DECODERS = {
    **dict.fromkeys(("Metaspace", "ByteFallback", "Fuse", "Strip"), UNCHANGED),
    **dict.fromkeys(("WordPiece", "BPEDecoder", "CTC"), 2),  # a space beside each token
    "ByteLevel": 3,  # U+FFFD for a byte that is no character
}
PROCESSORS: dict[str, int] = {
    **dict.fromkeys(
        ("ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing"), UNCHANGED
    )
}


@dataclass(frozen=True)
class Bounds:
    """Bounds for texts of one tokenizer: growth in its normalizer, and whether it has patterns."""

    growth: int = UNCHANGED
    has_patterns: bool = False

    def check(self, backend: tokenizers.Tokenizer, text: str) -> None:
        """Fail where a text would become far too large, or take far too long."""
        if backend.normalizer is not None and self.growth * len(text) > MEASURED:
            size, part = 0, MEASURED // self.growth
            for at in range(0, len(text), part):
                size += len(backend.normalizer.normalize_str(text[at : at + part]))
                if size > 4 * len(text) + MEASURED // 4:
                    got = f"{size} for the first {at + part}"
                    _refuse(
                        "the normalizer",
                        f"one that makes at most four letters of one in {len(text)}",
                        got,
                    )
        length = FIRST_WINDOW
        while self.has_patterns and length < len(text):
            for part in (text[:length], text[-length:]):
                begun, most = time.thread_time(), SLOW[0] + SLOW[1] * length
                if backend.normalizer is not None:
                    part = backend.normalizer.normalize_str(part)
                if backend.pre_tokenizer is not None:
                    backend.pre_tokenizer.pre_tokenize(tokenizers.PreTokenizedString(part))
                if (spent := time.thread_time() - begun) > most:
                    _refuse(
                        "a pattern", f"done with {length} letters in {most:.2f} s", f"{spent:.2f} s"
                    )
            length *= LATER_WINDOW


def check(text: str) -> Bounds:
    """The bounds of a tokenizer.json; CheckpointError names a component that exceeds the limits.

    Args:
        text: of the file. Duplicate names in an object are an error, since parsers differ on them.
    """
    values = parse_object(text, "tokenizer.json", pairs=_once)
    growth = _growth(values, "normalizer", NORMALIZERS, GROWTH)
    _growth(values, "pre_tokenizer", PRE_TOKENIZERS, PRE_GROWTH)
    _growth(values, "decoder", DECODERS, DECODED_GROWTH)
    _growth(values, "post_processor", PROCESSORS, UNCHANGED)
    if any(
        "Regex" in _pattern(part, "decoder")
        for part in _components(values, "decoder")
        if part["type"] == "Replace"
    ):
        _refuse("a decoder", "Replace of a plain text", "Replace of a regular expression")
    _check_processors(list(_components(values, "post_processor")))
    _check_model(values.get("model"))
    _check_added(values.get("added_tokens"), growth)
    pipeline = [*_components(values, "normalizer"), *_components(values, "pre_tokenizer")]
    patterns = {
        _pattern(one, "pipeline").get("Regex")
        for one in pipeline
        if one["type"] in ("Split", "Replace")
    }
    return Bounds(growth, bool(patterns - TRUSTED - {None}))


# The pipeline.


def _components(values: Mapping[str, Json], part: str) -> Iterator[dict[str, Json]]:
    """The components of a part of the pipeline, those of sequences one after the other."""
    waiting, seen = [values.get(part)], 0
    while waiting:
        one, seen = waiting.pop(0), seen + 1
        if one is None:
            continue
        if seen > MOST_COMPONENTS:
            _refuse(part, f"of at most {MOST_COMPONENTS} components", "more")
        if not isinstance(one, dict) or not isinstance(one.get("type"), str):
            _refuse(part, 'an object with a "type"', _kind(one))
        if one["type"] != "Sequence":
            yield one
            continue
        inner = next(
            (one[name] for name in (f"{part}s", "pretokenizers", "processors") if name in one), None
        )
        if not isinstance(inner, list):
            _refuse(part, "a Sequence of a list", _kind(inner))
        waiting = [*inner, *waiting]


def _growth(values: Mapping[str, Json], part: str, kinds: Mapping[str, int], most: int) -> int:
    """The most bytes that a part of the pipeline makes of one byte."""
    growth = UNCHANGED
    for one in _components(values, part):
        kind = one["type"]
        if kind == "Replace" and part in ("normalizer", "decoder"):
            growth *= _replaced(one, part)
        elif kind == "Prepend" and part == "normalizer":
            growth *= 1 + len(_text(one, "prepend", part).encode())
        elif kind == "Precompiled" and part == "normalizer":
            growth *= _longest_of_map(one)
        elif kind in kinds:
            growth *= kinds[kind]
            if kind == "Split":
                _pattern(one, part)
        else:
            _refuse(part, f"of a kind whose size is known, {', '.join(kinds)} among them", kind)
        if growth > most:
            _refuse(part, f"one that makes at most {most} bytes of one", f"{growth} with {kind}")
    return growth


def _replaced(one: Mapping[str, Json], part: str) -> int:
    """The most bytes that Replace makes of one byte: its content for each match, also empty."""
    pattern, content = _pattern(one, part), len(_text(one, "content", part).encode())
    matched = len(pattern.get("String", "").encode())
    return max(UNCHANGED, -(-content // matched)) if matched else 1 + content


def _pattern(one: Mapping[str, Json], part: str) -> Mapping[str, str]:
    """{"String": text} or {"Regex": text}."""
    pattern = one.get("pattern")
    if (
        not isinstance(pattern, dict)
        or len(pattern) != 1
        or not pattern.keys() <= {"String", "Regex"}
    ):
        _refuse(f"a pattern of the {part}", '{"String": text} or {"Regex": text}', _kind(pattern))
    (text,) = pattern.values()
    if not isinstance(text, str) or len(text) > LONGEST_PATTERN:
        _refuse(
            f"a pattern of the {part}", f"a text of at most {LONGEST_PATTERN} letters", _kind(text)
        )
    counts = [max(int(number[:9] or 0) for number in found) or 1 for found in COUNTED.findall(text)]
    if "Regex" in pattern and math.prod(counts) > MOST_COUNTED:
        _refuse(
            f"a pattern of the {part}",
            f"one that counts to {MOST_COUNTED} at most",
            math.prod(counts),
        )
    return pattern


def _longest_of_map(one: Mapping[str, Json]) -> int:
    """The most bytes of a replacement: Precompiled is a trie, then zero-terminated replacements."""
    stored = one.get("precompiled_charsmap")
    try:
        data = base64.b64decode(stored if isinstance(stored, str) else "", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    # bytes; the library makes room for as many as are said
    trie = int.from_bytes(data[:4], "little")
    if len(data) < 4 or trie > len(data) - 4:
        _refuse("precompiled_charsmap", "a map in base64, as large as it says", _kind(stored))
    return max(UNCHANGED, max(map(len, data[4 + trie :].split(b"\0"))))


def _check_processors(components: list[dict[str, Json]]) -> None:
    """Each inserts a text once, and adds few tokens."""
    ends = 0
    for one in components:
        if one["type"] != "TemplateProcessing":
            continue
        tokens = one.get("special_tokens", {})
        if not isinstance(tokens, dict) or not all(
            isinstance(token, dict) for token in tokens.values()
        ):
            _refuse("special_tokens of the post_processor", "an object of objects", _kind(tokens))
        ids = {name: token.get("ids") for name, token in tokens.items()}
        if not all(
            isinstance(found, list) and all(_is_id(n) for n in found) for found in ids.values()
        ):
            _refuse("ids of the post_processor", f"lists of ids below {MOST_IDS}", "others")
        for name in ("single", "pair"):
            pieces = one.get(name, [])
            if not isinstance(pieces, list) or not all(
                isinstance(piece, dict) and len(piece) == 1 for piece in pieces
            ):
                _refuse(f"{name} of the post_processor", "a list of pieces", _kind(pieces))
            named = [
                (kind, value.get("id") if isinstance(value, dict) else "")
                for piece in pieces
                for kind, value in piece.items()
            ]
            texts = [which for kind, which in named if kind == "Sequence"]
            if len({*map(str, texts)}) < len(texts) or (name == "single" and texts != ["A"]):
                _refuse(
                    f"{name} of the post_processor",
                    "one that puts a text there once",
                    f"{len(texts)} times",
                )
            ends += sum(len(ids.get(str(which), ())) for kind, which in named if kind != "Sequence")
    if ends > MOST_ENDS:
        _refuse(
            "the post_processor", f"one that puts at most {MOST_ENDS} tokens around a text", ends
        )


# The vocabulary.


def _check_model(model: Json) -> None:
    if not isinstance(model, dict):
        _refuse("model", "an object", _kind(model))
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the place
        if not all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            for entry in vocabulary
        ):
            _refuse("vocab", "a list of [token, score]", "another")
        tokens, ids = (
            [entry[0] for entry in vocabulary],
            [len(vocabulary) - 1] if vocabulary else [],
        )
    elif isinstance(vocabulary, dict):
        tokens, ids = vocabulary, vocabulary.values()
    else:
        _refuse("vocab", "an object or a list", _kind(vocabulary))
    if wrong := [n for n in ids if not _is_id(n)]:
        _refuse("an id in vocab", f"from 0 to {MOST_IDS - 1}", _kind(wrong[0]))
    longest = max(map(len, tokens), default=0)
    longest = max([longest, *(len(value) for value in model.values() if isinstance(value, str))])
    if longest > LONGEST:
        _refuse("a token of the model", f"of at most {LONGEST} letters", longest)
    width = model.get("max_input_chars_per_word")
    if width is not None and (
        isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= LONGEST
    ):
        _refuse(
            "max_input_chars_per_word", f"at most {LONGEST}: what a word costs is its square", width
        )


def _check_added(added: Json, growth: int) -> None:
    if added is None:
        return
    if (
        not isinstance(added, list)
        or len(added) > MOST_ADDED
        or not all(isinstance(token, dict) for token in added)
    ):
        _refuse("added_tokens", f"a list of at most {MOST_ADDED} objects", _kind(added))
    size = 0
    for token in added:
        content = _text(token, "content", "added_tokens")
        if not _is_id(token.get("id")):
            _refuse("an id in added_tokens", f"from 0 to {MOST_IDS - 1}", _kind(token.get("id")))
        size += len(content.encode("utf-8", "replace")) * (
            growth if token.get("normalized", True) is not False else UNCHANGED
        )
    if size > ADDED_SIZE:
        _refuse("added_tokens", f"{ADDED_SIZE} letters at most", size)


# What a file says.


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < MOST_IDS


def _text(one: Mapping[str, Json], name: str, part: str) -> str:
    value = one.get(name)
    if not isinstance(value, str) or len(value) > LONGEST:
        _refuse(f"{name} in {part}", f"a text of at most {LONGEST} letters", _kind(value))
    return value


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """Reject duplicate names, on which parsers differ; of ids in a vocabulary all take the last."""
    found = dict(pairs)
    if len(found) < len(pairs) and not all(type(value) is int for _, value in pairs):
        _refuse("an object", "one of different names", "a name twice")
    return found


def _kind(value: object) -> str:
    sized = f" of {len(value)}" if isinstance(value, str | list | dict) else ""
    return f"{value}" if isinstance(value, int | float) else f"{type(value).__name__}{sized}"


def _refuse(what: str, wanted: str, got: object) -> NoReturn:
    remedy = "Fetch the file again; one that asks for this would fill the memory, or take for ever."
    fail("load", f"{what} in tokenizer.json", wanted, got, remedy, CheckpointError)
