"""vocab.txt of BERT's WordPiece, where there is no tokenizer.json: a token a line.

Text is cleaned, in small letters without accents where the settings say so, cut at spaces,
punctuation and around Chinese characters, and each word into its longest pieces from the left.

Source: Schuster and Nakajima, Japanese and Korean voice search, 2012; transformers,
    models/bert/tokenization_bert.py.
"""

from collections.abc import Mapping
from typing import NoReturn

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json
from .library import rust_errors

FILE = "vocab.txt"
CLASSES = ("BertTokenizer", "BertTokenizerFast", "ElectraTokenizer", "ElectraTokenizerFast")
OF_FAMILY = ("bert", "electra", "megatron-bert")  # model_type where no file names a class
ROLES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
SETTINGS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}


def is_read(model_type: Json, settings: Mapping[str, Json]) -> bool:
    """True where vocab.txt is of a class that cuts text so.

    Args:
        model_type: as config.json says. settings: tokenizer_config.json.
    """
    said = settings.get("tokenizer_class")
    known = model_type in OF_FAMILY if said is None else said in CLASSES
    return known and settings.get("do_basic_tokenize") is not False


def as_tokenizer_json(
    text: str, settings: Mapping[str, Json], beside: Mapping[str, Json]
) -> tuple[str, dict[str, Json]]:
    """tokenizer.json, and tokenizer_config.json with the special tokens that the class has.

    Args:
        text: of vocab.txt. settings: tokenizer_config.json.
        beside: the values of special_tokens_map.json and its kin, by file.

    Raises:
        CheckpointError: a special token is not among the lines, or a setting is no bool.

    Law: ids are those of transformers (test_word_pieces.py::test_ids_are_those_of_transformers).
    """
    named = {**beside.get("special_tokens_map.json", {}), **settings}
    roles = {**ROLES, **{role: named[role] for role in ROLES if named.get(role) is not None}}
    texts = {role: _text(role, value) for role, value in roles.items()}
    flags = {name: _flag(name, settings.get(name, usual)) for name, usual in SETTINGS.items()}
    lines = text.split("\n")
    lines = lines[:-1] if lines and not lines[-1] else lines
    ids = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    for role in ("unk_token", "cls_token", "sep_token"):
        if texts[role] not in ids:
            _refuse(f"the lines of {FILE}", f"{texts[role]!r} among them, the {role}", "none")
    with rust_errors(FILE):
        backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=texts["unk_token"]))
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=bool(flags["tokenize_chinese_chars"]),
            strip_accents=flags["strip_accents"],
            lowercase=bool(flags["do_lower_case"]),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        around = [(texts[role], ids[texts[role]]) for role in ("sep_token", "cls_token")]
        backend.post_processor = processors.BertProcessing(*around)
        made = backend.to_str()
    return made, {**roles, **settings}


def _text(role: str, value: Json) -> str:
    found = value.get("content") if isinstance(value, dict) else value
    if not isinstance(found, str):
        _refuse(f"{role} beside {FILE}", "a text, or an object with one", repr(value)[:100])
    return found


def _flag(name: str, value: Json) -> bool | None:
    if value is not None and not isinstance(value, bool):
        _refuse(f"{name} of tokenizer_config.json", "true, false or null", repr(value)[:100])
    return value


def _refuse(what: str, wanted: str, got: str) -> NoReturn:
    remedy = "The file is damaged, or of another tokenizer: fetch it again."
    fail("load", what, wanted, got, remedy, CheckpointError)
