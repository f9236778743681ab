"""A tokenizer from the metadata of a GGUF file: byte-level BPE, SentencePiece, or Gemma 4's."""

from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from ..families.tables import Json
from ..gguf import metadata as fields
from .library import rust_errors
from .sentencepiece import merged, pieces
from .splits import DIGIT, GPT2, SPLITS, Split, pre_tokenizer
from .tokenizer import Tokenizer
from .tokenizer_json import LLAMA3, QWEN2, Bounds
from .turns import NAMES, ends_of_turns

COMPOSED = ("qwen2", "deepseek-r1-qwen", "qwen35")  # names whose models read text in NFC
TRUSTED = {LLAMA3, QWEN2, GPT2, DIGIT}  # patterns whose every match ends soon
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of token in GGUF
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def from_metadata(metadata: Mapping[str, Json]) -> Tokenizer | None:
    """A Tokenizer from the metadata of a GGUF file: byte-level BPE with one of the known splits of
    text, or SentencePiece's, whose pairs follow from scores or (Gemma 4) are told. None for a file
    without a tokenizer.
    """
    if not any(name.startswith("tokenizer.ggml.") for name in metadata):
        return None
    kind_of_model = fields.text(metadata, "tokenizer.ggml.model")
    if kind_of_model in ("none", "no_vocab"):
        return None
    if kind_of_model not in ("gpt2", "llama", "gemma4"):
        wanted = "gpt2 (byte-level BPE), llama (SentencePiece) or gemma4"
        fields.refuse("tokenizer.ggml.model", wanted, kind_of_model)
    tokens = fields.texts(metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        fields.refuse(
            "tokenizer.ggml.tokens", "all different", f"{len(tokens) - len(set(tokens))} twice"
        )
    kinds = fields.integers(metadata, "tokenizer.ggml.token_type", len(tokens))
    id_of = lambda name: fields.index(metadata, f"tokenizer.ggml.{name}", len(tokens))
    leading_space = fields.flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    leading_space &= kind_of_model != "gemma4"  # whatever the file says, as llama.cpp has it
    if kind_of_model == "gpt2":
        backend, split = _byte_level(metadata, tokens)
        first, bounds = split.begins, Bounds(has_patterns=not TRUSTED.issuperset(split.expressions))
    else:
        unknown = id_of("unknown_token_id")
        named = None if unknown is None else tokens[unknown]
        if kind_of_model == "gemma4":
            merges = _merges(metadata)
            with rust_errors("tokenizer.ggml.merges"):
                backend = merged(tokens, merges, named, leading_space=leading_space)
        else:
            scores = fields.floats(metadata, "tokenizer.ggml.scores", len(tokens)).tolist()
            with rust_errors("tokenizer.ggml.tokens"):
                backend = pieces(tokens, scores, kinds.tolist(), named, leading_space=leading_space)
        first, bounds = True, Bounds()
    control = set(np.flatnonzero(kinds == CONTROL).tolist())
    ends = ends_of_turns(metadata, tokens, control)
    # whatever kind the file says
    special_ids = control | {number for number in ends if tokens[number] in NAMES}
    for special in (True, False):
        ids = (
            sorted(special_ids)
            if special
            else [n for n in np.flatnonzero(kinds == USER_DEFINED).tolist() if n not in special_ids]
        )
        add = backend.add_special_tokens if special else backend.add_tokens
        # such tokens may hold SentencePiece's sign for a space
        spaced = not special and not leading_space
        add(
            [
                AddedToken(tokens[number], normalized=spaced, special=special)
                for number in ids
                if tokens[number]
            ]
        )

    roles = {
        role: tokens[number] for role, name in ROLES.items() if (number := id_of(name)) is not None
    }
    begin = id_of("bos_token_id")
    begins = fields.flag(metadata, "tokenizer.ggml.add_bos_token", first)
    # files of Gemma 4 that say otherwise are corrected by llama.cpp too
    if (begins or kind_of_model == "gemma4") and begin is not None and tokens[begin]:
        # The library reads a piece as name:type, and $A as the text.
        name = tokens[begin] if not set(tokens[begin]) & set(":$") else "the first token"
        known = [{"id": name, "ids": [begin], "tokens": [tokens[begin]]}]
        beginning = processors.TemplateProcessing(single=[name, "$A"], special_tokens=known)
        of_bytes = [processors.ByteLevel(trim_offsets=False)] if kind_of_model == "gpt2" else []
        backend.post_processor = processors.Sequence([*of_bytes, beginning])
    template = fields.optional_text(metadata, "tokenizer.chat_template")
    return Tokenizer(backend, ends, template, roles, bounds, _named_templates(metadata))


def _named_templates(metadata: Mapping[str, Json]) -> dict[str, str]:
    """The chat templates beside the default, by name."""
    if "tokenizer.chat_templates" not in metadata:
        return {}
    names = fields.texts(metadata, "tokenizer.chat_templates")
    found = {name: fields.text(metadata, f"tokenizer.chat_template.{name}") for name in names}
    return {name: text for name, text in found.items() if name != "default"}


def _merges(metadata: Mapping[str, Json]) -> list[tuple[str, str]]:
    """Pairs of tokens, the first to be joined first."""
    merges = fields.texts(metadata, "tokenizer.ggml.merges")
    wrong = [merge for merge in merges if merge.count(" ") != 1]
    if wrong:
        fields.refuse("tokenizer.ggml.merges", "pairs of tokens", wrong[0])
    return [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]


def _byte_level(
    metadata: Mapping[str, Json], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, Split]:
    """Byte-level BPE, and how it cuts text."""
    ids = {token: number for number, token in enumerate(tokens)}
    pairs = _merges(metadata)
    name = fields.text(metadata, "tokenizer.ggml.pre")
    if name not in SPLITS:
        fields.refuse("tokenizer.ggml.pre", f"one of {', '.join(SPLITS)}", name)
    split = SPLITS[name]
    with rust_errors("tokenizer.ggml.merges"):
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=ids, merges=pairs, ignore_merges=split.ignores_merges)
        )
    backend.pre_tokenizer, backend.decoder = pre_tokenizer(split), decoders.ByteLevel()
    if name in COMPOSED:
        backend.normalizer = normalizers.NFC()
    return backend, split
