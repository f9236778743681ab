"""Byte-level tokenizers whose files list byte strings by rank: tekken.json and tiktoken's files.

A text is cut by a pattern; of each piece the two neighbours whose join has the least rank are
joined, until none is a token. A piece that is a token is not cut. Merges are all ways to cut a
token into two others, by its rank.

    tekken.json        {"config": {"pattern", "default_vocab_size", "default_num_special_tokens"},
                        "vocab": [{"token_bytes": base64}], "special_tokens": [{"rank",
                        "token_str"}]}; ids of byte strings are behind those of special tokens
    qwen.tiktoken      lines of base64 and rank; special tokens are added_tokens_decoder of
    tokenizer.model    tokenizer_config.json, and the pattern is that of Qwen, of Llama 3

Source: github.com/mistralai/mistral-common, tokens/tokenizers/tekken.py; transformers,
    integrations/mistral/tokenizer.py, MistralConverter; github.com/openai/tiktoken,
    _educational.py.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json
from ..regular_files import parse_object
from .tokenizer_json import LLAMA3, LONGEST_PATTERN, MOST_IDS, QWEN2

TEKKEN, QWEN, MODEL = "tekken.json", "qwen.tiktoken", "tokenizer.model"
LONGEST = 2**9  # bytes of a token, which is cut at every byte; 128 are the most seen
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _letters() -> dict[int, int]:
    """The letter of each byte in the vocabulary of a byte-level tokenizer, for str.translate."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = {byte: 256 + n for n, byte in enumerate(x for x in range(256) if x not in shown)}
    return {byte: hidden.get(byte, byte) for byte in range(256)}


LETTERS = _letters()


def from_tekken(text: str) -> tuple[str, dict[str, str]]:
    """The text of tokenizer.json for a tekken.json, and its special tokens by role.

    Raises:
        CheckpointError: the file is damaged, or of the first version, without special tokens.
    """
    values = parse_object(text, TEKKEN)
    config, entries, special = (values.get(x) for x in ("config", "vocab", "special_tokens"))
    if not isinstance(config, dict) or not isinstance(entries, list):
        _refuse(TEKKEN, "config and vocab", f"{sorted(values)[:9]}")
    if not isinstance(special, list) or not all(isinstance(one, dict) for one in special):
        _refuse(TEKKEN, "special_tokens", "none")
    if sorted(str(one.get("rank")) for one in special) != sorted(map(str, range(len(special)))):
        _refuse(TEKKEN, "special tokens of ranks 0, 1, ...", "others")
    texts = [one.get("token_str") for one in sorted(special, key=lambda one: one["rank"])]
    count = _whole(config, "default_num_special_tokens", len(texts))
    size = _whole(config, "default_vocab_size", count + len(entries))
    if not all(isinstance(one, str) and one for one in texts) or not len(texts) <= count <= size:
        _refuse(TEKKEN, f"at most {size} tokens, special ones of a text", f"{count}")
    texts += [f"<SPECIAL_{number}>" for number in range(len(texts), count)]
    first = [one.get("token_bytes") if isinstance(one, dict) else 0 for one in entries]
    ranks = dict(enumerate((_bytes(one, TEKKEN) for one in first[: size - count]), count))
    pattern = config.get("pattern")
    begin = ROLES["bos_token"] if ROLES["bos_token"] in texts else None
    roles = {role: name for role, name in ROLES.items() if name in texts}
    return _built(TEKKEN, ranks, dict(enumerate(texts)), pattern, begin), roles


def from_tiktoken(
    data: bytes, name: str, model_type: Json, settings: Mapping[str, Json]
) -> str | None:
    """The text of tokenizer.json for a file of tiktoken, or None where nothing says its pattern or
    its special tokens.

    Args:
        data: of the file. name: of the file. model_type: of config.json.
        settings: tokenizer_config.json.
    """
    pattern = QWEN2 if name == QWEN else LLAMA3 if model_type == "llama" else None
    table = settings.get("added_tokens_decoder")
    if pattern is None or not isinstance(table, dict) or not table:
        return None
    ranks: dict[int, bytes] = {}
    for line in data.split(b"\n"):
        if line.strip():
            token, _, rank = line.strip().partition(b" ")
            if not rank.isdigit() or len(rank) > 9 or int(rank) in ranks:
                _refuse(f"a line of {name}", "base64, a space, and a rank", repr(line[:40]))
            ranks[int(rank)] = _bytes(token, name)
    special: dict[int, Json] = {
        int(number): entry.get("content")
        for number, entry in table.items()
        if str(number).isdecimal() and len(str(number)) < 10 and isinstance(entry, dict)
    }
    if not all(isinstance(one, str) for one in special.values()) or special.keys() & ranks.keys():
        _refuse(f"special tokens of {name}", "texts with ids that no rank is", "others")
    begin = None if name == QWEN else settings.get("bos_token")
    return _built(name, ranks, special, pattern, begin if isinstance(begin, str) else None)


def is_tiktoken(data: bytes) -> bool:
    """True for lines of base64 and a rank, which no protocol buffer is."""
    token, _, rank = data[: 2**10].partition(b"\n")[0].strip().partition(b" ")
    return re.fullmatch(rb"[A-Za-z0-9+/]+=*", token) is not None and rank.isdigit()


def _built(
    name: str, ranks: Mapping[int, bytes], special: Mapping[int, str], pattern: Json, begin: Json
) -> str:
    """tokenizer.json of byte strings by id, special tokens by id, and a pattern."""
    tokens = {token: number for number, token in sorted(ranks.items())}
    if len(tokens) != len(ranks) or not 256 <= len(tokens) + len(special) <= MOST_IDS:
        _refuse(f"tokens of {name}", f"256 to {MOST_IDS}, each once", len(ranks))
    if any(bytes([byte]) not in tokens for byte in range(256)):
        _refuse(f"tokens of {name}", "all single bytes among them", "some")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= LONGEST_PATTERN:
        _refuse(f"the pattern of {name}", f"a text of at most {LONGEST_PATTERN} letters", pattern)
    vocabulary = {_spelled(token): number for token, number in tokens.items()}
    if vocabulary.keys() & set(special.values()) or len(set(special.values())) < len(special):
        _refuse(f"special tokens of {name}", "texts that no other token has", "others")
    vocabulary |= {text: number for number, text in special.items()}
    empty = tokenizers.Tokenizer(models.BPE())
    try:
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # of Oniguruma, which has no type of its own
        _refuse(f"the pattern of {name}", "a regular expression", str(error)[:100])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    empty.pre_tokenizer = pre_tokenizers.Sequence([words, whole])
    empty.decoder = decoders.ByteLevel()
    if begin in vocabulary:
        empty.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
        )
    values = json.loads(empty.to_str())
    values["model"] |= {
        "vocab": vocabulary,
        "merges": [[_spelled(a), _spelled(b)] for a, b in _merges(tokens)],
        "ignore_merges": True,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"] = [
        {"id": number, "content": text, "special": True, **flags}
        for number, text in sorted(special.items())
    ]
    return json.dumps(values)


def _merges(tokens: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every way to cut a token into two others, by the ids of token, first part and second."""
    for token in tokens:  # by id
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [cut for cut in cuts if cut[0] in tokens and cut[1] in tokens]
        yield from sorted(found, key=lambda cut: (tokens[cut[0]], tokens[cut[1]]))


def _spelled(token: bytes) -> str:
    return token.decode("latin-1").translate(LETTERS)


def _bytes(text: object, name: str) -> bytes:
    if isinstance(text, str | bytes):
        try:
            token = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            token = b""
        if 0 < len(token) <= LONGEST:
            return token
    _refuse(f"a token of {name}", f"base64 of 1 to {LONGEST} bytes", repr(text)[:40])


def _whole(config: Mapping[str, Json], name: str, usual: int) -> int:
    value = config.get(name, usual)
    value = usual if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_IDS:
        _refuse(f"{name} of {TEKKEN}", f"a number up to {MOST_IDS}", value)
    return value


def _refuse(what: str, wanted: str, got: object) -> NoReturn:
    remedy = "The file is damaged, or of another version: fetch it again."
    fail("load", what, wanted, got, remedy, CheckpointError)
