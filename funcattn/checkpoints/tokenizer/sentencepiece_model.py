"""tokenizer.model: the pieces of a SentencePiece tokenizer, BPE or Unigram, a protocol buffer.

    ModelProto      1 SentencePiece (several), 2 TrainerSpec, 3 NormalizerSpec
    SentencePiece   1 text, 2 score (float), 3 kind, as GGUF numbers them
    TrainerSpec     3 kind of model (1 is Unigram, 2 BPE), 24 spaces behind words, 35 unknown
                    letters in bytes, 40 41 42 43 ids of unk, bos, eos and pad
    NormalizerSpec  2 a map of characters, 3 a space before a text, 4 remove further spaces, 5 write
                    a sign for spaces

A message is fields: a varint of 8 number + wire type, then a varint (0), eight bytes (1), a length
and as many bytes (2), or four bytes (5). Every length is checked against the bytes that are left.

Source: github.com/google/sentencepiece, src/sentencepiece_model.proto; protobuf.dev, encoding.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from typing import NoReturn

import numpy as np

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json
from . import unigram
from .gguf_metadata import from_metadata
from .library import rust_errors
from .tokenizer_json import MOST_IDS

FILE = "tokenizer.model"
UNIGRAM, BPE, UNUSED = 1, 2, -1
SUFFIX, FALLBACK = 24, 35  # fields of the trainer
# of transformers, whose tokenizers are made of such files as here
CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
IDS = {
    "unknown_token_id": (40, 0, "unk_token"),
    "bos_token_id": (41, 1, "bos_token"),
    "eos_token_id": (42, 2, "eos_token"),
    "padding_token_id": (43, UNUSED, "pad_token"),
}


def as_tokenizer_json(
    data: bytes, settings: Mapping[str, Json]
) -> tuple[str, dict[str, str]] | str:
    """The text of tokenizer.json for the bytes of tokenizer.model, and the special tokens by role;
    or why it would be another tokenizer.

    Args:
        settings: tokenizer_config.json.

    Raises:
        CheckpointError: the file is damaged.
    """
    parts = list(_fields(data))
    trainer, normalizer = (
        dict(_fields(b"".join(_message(value) for number, value in parts if number == which)))
        for which in (2, 3)
    )
    messages = [value for number, value in parts if number == 1]
    if not 0 < len(messages) <= MOST_IDS:
        _refuse("the pieces", f"from 1 to {MOST_IDS}", len(messages))
    said = settings.get("tokenizer_class")
    if said not in CLASSES:
        return f"of the class {said}"
    if settings.get("add_eos_token"):
        return "with an end after each text"
    if trainer.get(3, UNIGRAM) == UNIGRAM:
        if said is not None:  # which transformers reads as BPE
            return f"of the kind Unigram, and of the class {said}"
        return _of_unigram(messages, trainer, normalizer, settings)
    if trainer[3] != BPE:
        return "of neither the kind BPE nor Unigram"
    if normalizer.get(2) or normalizer.get(4, 1):
        return "with a normalizer"
    tokens, scores, kinds = _pieces(messages)
    space, begins = settings.get("add_prefix_space"), settings.get("add_bos_token")
    metadata: dict[str, Json] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.add_space_prefix": space is not False and bool(normalizer.get(3, 1)),
        "tokenizer.ggml.add_bos_token": begins is not False,
    }
    there = _roles(trainer, len(tokens))
    found = from_metadata(
        metadata | {f"tokenizer.ggml.{name}": number for name, number in there.items()}
    )
    assert found is not None  # of metadata that has tokens
    return found.backend.to_str(), {IDS[name][2]: tokens[number] for name, number in there.items()}


def _of_unigram(
    messages: list[Json],
    trainer: Mapping[int, Json],
    normalizer: Mapping[int, Json],
    settings: Mapping[str, Json],
) -> tuple[str, dict[str, str]] | str:
    """`as_tokenizer_json` of the kind Unigram; a beginning is put where the settings say so."""
    tokens, scores, kinds = _pieces(messages)
    there = _roles(trainer, len(tokens))
    if trainer.get(SUFFIX) or not normalizer.get(5, 1):
        return "with spaces behind words, or without a sign for them"
    if "unknown_token_id" not in there or len(set(tokens)) < len(tokens):
        _refuse("the pieces", "all different, one of them unknown", "others")
    if any(not math.isfinite(score) for score in scores):
        _refuse("a score", "a finite number", "another")
    with rust_errors(FILE):
        backend = unigram.unigram(
            tokens,
            scores,
            kinds,
            there["unknown_token_id"],
            byte_fallback=bool(trainer.get(FALLBACK)),
            leading_space=bool(normalizer.get(3, 1)),
            single_spaces=bool(normalizer.get(4, 1)),
            charsmap=_message(normalizer.get(2, b"")),
        )
        if isinstance(backend, str):
            return backend
        begin = there.get("bos_token_id") if settings.get("add_bos_token") is True else None
        unigram.with_special(backend, tokens, kinds, begin)
        return backend.to_str(), {IDS[name][2]: tokens[number] for name, number in there.items()}


def _roles(trainer: Mapping[int, Json], count: int) -> dict[str, int]:
    """The ids of special tokens that are there, by their names in GGUF."""
    ids = {name: _signed(trainer.get(number, usual)) for name, (number, usual, _) in IDS.items()}
    return {name: number for name, number in ids.items() if 0 <= number < count}


def _pieces(messages: list[Json]) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and kinds."""
    tokens, scores, kinds = [], [], []
    for number, message in enumerate(messages):
        piece = dict(_fields(_message(message)))
        try:
            tokens.append(_message(piece.get(1, b"")).decode())
        except UnicodeDecodeError:
            _refuse(f"piece {number}", "UTF-8", repr(piece[1][:40]))
        scores.append(piece.get(2, 0.0))
        kinds.append(piece.get(3, 1))
        if not isinstance(scores[-1], float) or kinds[-1] not in range(1, 7):
            _refuse(f"piece {number}", "a float and a kind from 1 to 6", str(piece)[:100])
    return tokens, scores, kinds


# Protocol buffers.


def _fields(data: bytes) -> Iterator[tuple[int, Json]]:
    """Number and value of each field: an int, a float (of four bytes), or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            if size > len(data) - at:
                _refuse(f"a field at byte {at}", f"at most {len(data) - at} bytes", size)
            value = data[at : at + size]
            at += size
            value = struct.unpack("<f", value)[0] if wire == 5 else value
        else:
            _refuse(f"a field at byte {at}", "of wire type 0, 1, 2 or 5", wire)
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits in each byte, the lowest first, and the place behind it."""
    found = 0
    for place in range(10):  # 64 bits
        if at + place >= len(data):
            break
        found |= (data[at + place] & 0x7F) << 7 * place
        if data[at + place] < 0x80:
            return found, at + place + 1
    _refuse(f"a number at byte {at}", "of at most ten bytes", "more, or the end")


def _signed(value: Json) -> int:
    """A number of 64 bits that may be negative."""
    if not isinstance(value, int):
        _refuse("an id of the trainer", "a number", repr(value)[:40])
    return value - 2**64 if value >= 2**63 else value


def _message(value: Json) -> bytes:
    if not isinstance(value, bytes):
        _refuse("a message", "bytes", repr(value)[:40])
    return value


def _refuse(what: str, wanted: str, got: object) -> NoReturn:
    remedy = "The file is damaged, or not SentencePiece's: fetch it again."
    fail("load", f"{what} of {FILE}", wanted, got, remedy, CheckpointError)
