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

import json
import re
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from ...core.errors import fail
from .tokenizer_json import LLAMA3, QWEN2

CHUNK = 2**18  # letters that are encoded at once: some 50 MB
MAX_LETTERS = 2**24  # of a text that cannot be cut: some 3 GB
CUT = re.compile(r"(?<=\S)(?= )|(?<=[^\W_])(?=[\r\n,.!?;:，。、！？；：])")


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
    if len(text) > CHUNK and is_local(backend):
        while (at := CUT.search(text, begins[-1] + CHUNK)) is not None:
            begins.append(at.start())
    elif len(text) > MAX_LETTERS:
        remedy = "Encode it paragraph by paragraph."
        fail("encode", "text", f"of at most {MAX_LETTERS} letters for this tokenizer", len(text), remedy)
    ids, offsets, mask = [], [], []
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(text)], strict=True)):
        outer = number == 0 or number == len(begins) - 1
        one = backend.encode(text[begin:end], add_special_tokens=add_special_tokens and outer)
        inside = [i for i, added in enumerate(one.special_tokens_mask) if not added] or [0]
        first = 0 if number == 0 else inside[0]
        last = len(one.ids) if number == len(begins) - 1 else inside[-1] + 1
        ids += one.ids[first:last]
        offsets.append(np.array(one.offsets[first:last], dtype=np.int64).reshape(-1, 2) + begin)
        mask += one.special_tokens_mask[first:last]
    return Encoded(ids, np.concatenate(offsets), mask)


def is_local(backend: tokenizers.Tokenizer) -> bool:
    """True where the ids of a text are those of its pieces between the places of CUT."""
    if any(CUT.search(token.content) or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return False
    if backend.normalizer is not None and _parts(backend.normalizer) != [{"type": "NFC"}]:
        return False
    parts = [] if backend.pre_tokenizer is None else _parts(backend.pre_tokenizer)
    return all(map(_keeps_places, parts)) and any(map(_splits, parts))


def _parts(component: Any) -> list[dict[str, Any]]:
    """A component as tokenizer.json holds it, those of a sequence one after the other."""
    value = json.loads(component.__getstate__())
    return value.get("pretokenizers") or value.get("normalizers") or [value]


def _splits(part: dict[str, Any]) -> bool:
    """True where a part ends a word at each place of CUT."""
    if part["type"] == "Split":
        return part["pattern"].get("Regex") in (LLAMA3, QWEN2) and part["behavior"] == "Isolated" and not part["invert"]
    return part["type"] == "ByteLevel" and part["use_regex"]


def _keeps_places(part: dict[str, Any]) -> bool:
    """True where a part makes the same of a text whatever stands before and behind it."""
    return _splits(part) | (part["type"] in ("Digits", "ByteLevel")) and not part.get("add_prefix_space")
