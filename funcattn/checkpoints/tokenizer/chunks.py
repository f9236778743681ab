"""Encoding long texts piece by piece: the same ids in bounded memory.

An Encoding of the `tokenizers` library takes some 200 bytes for each letter. A text may be cut
before a space, and between a letter or digit and a line break or punctuation, wherever neither the
normalizer nor the patterns of the pre-tokenizer look across that place. That is known of no
normalizer and of NFC, which joins no two characters there, and of the patterns of GPT-2, Llama 3
and Qwen 2: no match of theirs spans such a place, and none looks behind its own beginning. Other
tokenizers get the whole text at once.

Law: ids, offsets and mask are those of the whole text
(test_chunks.py::test_a_text_in_chunks_is_encoded_as_the_whole).
"""

import itertools
import json
import re
from typing import NamedTuple

import numpy as np
import tokenizers

from ...core.errors import fail
from ..families.tables import Json
from .tokenizer_json import LLAMA3, QWEN2

CHUNK = 2**18  # letters that are encoded at once: some 50 MB
MAX_LETTERS = 2**24  # of a text that cannot be cut: some 3 GB
FRAMED = 64  # letters, of which what a tokenizer puts before and behind a text is seen
BEHIND = r"[\r\n,.!?;:，。、！？；：]"  # what may stand behind a cut, beside a space
CUT = re.compile(rf"(?<=\S)(?= )|(?<=[^\W_])(?={BEHIND})")


class Encoded(NamedTuple):
    """Ids, the letters [begin, end) that each stands for, and 1 for those put first or last."""

    ids: list[int]
    offsets: np.ndarray  # (number of ids, 2)
    mask: list[int]


def encode(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> Encoded:
    """The ids of a text; the caller holds the lock of the backend.

    Raises:
        ValueError: it is longer than MAX_LETTERS, and cannot be cut.
    """
    begins = [0]
    while len(text) > CHUNK and is_local(backend) and (at := CUT.search(text, begins[-1] + CHUNK)):
        begins.append(at.start())
    pieces = list(itertools.pairwise([*begins, len(text)]))
    longest = max(end - begin for begin, end in pieces)
    if longest > MAX_LETTERS:
        remedy = "Encode it paragraph by paragraph."
        fail(
            "encode",
            "text",
            f"of at most {MAX_LETTERS} letters that this tokenizer cannot cut",
            longest,
            remedy,
        )
    frame = _encoded(backend, text[:FRAMED], add_special_tokens=add_special_tokens)
    inside = [i for i, added in enumerate(frame.mask) if not added]
    if len(pieces) == 1 or not inside:
        return _encoded(backend, text, add_special_tokens=add_special_tokens)
    part = lambda at: Encoded(frame.ids[at], frame.offsets[at], frame.mask[at])
    found = [part(slice(inside[0]))]
    for begin, end in pieces:
        ids, offsets, mask = _encoded(backend, text[begin:end], add_special_tokens=False)
        found.append(Encoded(ids, offsets + begin, mask))
    found.append(part(slice(inside[-1] + 1, None)))
    ids, offsets, mask = zip(*found, strict=True)
    return Encoded([*itertools.chain(*ids)], np.concatenate(offsets), [*itertools.chain(*mask)])


def _encoded(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> Encoded:
    one = backend.encode(text, add_special_tokens=add_special_tokens)
    return Encoded(
        one.ids, np.array(one.offsets, dtype=np.int64).reshape(-1, 2), one.special_tokens_mask
    )


def is_local(backend: tokenizers.Tokenizer) -> bool:
    """True where the ids of a text are those of its pieces between the places of CUT."""
    added = backend.get_added_tokens_decoder().values()
    if any(
        CUT.search(x.content) or x.rstrip or (x.single_word and re.match(f" |{BEHIND}", x.content))
        for x in added
    ):
        return False
    if backend.normalizer is not None and _parts(backend.normalizer) != [{"type": "NFC"}]:
        return False
    parts = [] if backend.pre_tokenizer is None else _parts(backend.pre_tokenizer)
    return all(map(_keeps_places, parts)) and any(map(_splits, parts))


def _parts(component: Json) -> list[dict[str, Json]]:
    """A component as tokenizer.json holds it, those of a sequence one after the other."""
    value = json.loads(component.__getstate__())
    return value.get("pretokenizers") or value.get("normalizers") or [value]


def _splits(part: dict[str, Json]) -> bool:
    """True where a part ends a word at each place of CUT."""
    if part["type"] == "Split":
        return (
            part["pattern"].get("Regex") in (LLAMA3, QWEN2)
            and part["behavior"] == "Isolated"
            and not part["invert"]
        )
    return part["type"] == "ByteLevel" and part["use_regex"]


def _keeps_places(part: dict[str, Json]) -> bool:
    """True where a part makes the same of a text whatever stands before and behind it."""
    return _splits(part) | (part["type"] in ("Digits", "ByteLevel")) and not part.get(
        "add_prefix_space"
    )
