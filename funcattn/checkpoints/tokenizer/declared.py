"""The files beside tokenizer.json: special tokens and chat templates, as releases of transformers
wrote them.

    tokenizer_config.json            bos_token and its kin, extra_special_tokens,
                                     added_tokens_decoder, chat_template
    special_tokens_map.json          the same names, read where there is no added_tokens_decoder
    added_tokens.json                text -> id, likewise
    chat_template.jinja              before chat_template of tokenizer_config.json
    additional_chat_templates/       more, by name; "default" is the one that is used
    chat_template.json               {"chat_template": ...}, where there is no other

Tokens that tokenizer.json lacks are added to it in the order in which transformers adds them, and
have its ids; where a file says another id the folder is refused.

Source: transformers, tokenization_utils_base.py, _from_pretrained;
    tokenization_utils_tokenizers.py, TokenizersBackend.
"""

from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import tokenizers
from tokenizers import AddedToken

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = {"content", "single_word", "lstrip", "rstrip", "normalized", "special"}
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")
OTHERS = {  # files of a tokenizer in another layout
    "tokenizer.model": "SentencePiece's",
    "vocab.json": "a vocabulary with its merges",
    "vocab.txt": "WordPiece's",
    "tekken.json": "Mistral's",
    "spiece.model": "SentencePiece's",
    "qwen.tiktoken": "tiktoken's",
}


class Declared(NamedTuple):
    """Names that a template may use -> their texts; the template, or None; others by name."""

    roles: dict[str, str]
    template: str | None
    named: dict[str, str]


def declare(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Json],
    beside: Mapping[str, Json],
    templates: Mapping[str, str],
) -> Declared:
    """Add to a tokenizer what is declared beside it.

    Args:
        backend: that of tokenizer.json; it is changed.
        settings: tokenizer_config.json.
        beside: the values of the files of `BESIDE` that are there, by name.
        templates: the texts of chat_template.jinja ("default") and of additional_chat_templates, by
            name.
    """
    if settings.get("split_special_tokens"):
        _refuse("split_special_tokens of tokenizer_config.json", "false", True)
    values = dict(settings)
    table: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in values:
        entries = _mapping(
            values["added_tokens_decoder"], "added_tokens_decoder of tokenizer_config.json"
        )
        table = {
            _id(number, "added_tokens_decoder"): _token(entry, "added_tokens_decoder")
            for number, entry in entries.items()
        }
    else:
        values |= _mapping(beside.get("special_tokens_map.json", {}), "special_tokens_map.json")
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    for name in NAMED:
        if not isinstance(values.get(name), str | dict | None) and values[name] is not False:
            _refuse(
                f"{name} beside tokenizer.json",
                "a text, an object or null",
                repr(values[name])[:100],
            )
    named = {
        name: value
        for name, value in values.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    named |= extra if isinstance(extra, dict) else {}
    named = {name: _token(value, name, special=True) for name, value in named.items()}
    extra = [
        _token(value, "extra_special_tokens", special=True)
        for value in ([] if isinstance(extra, dict) else extra)
    ]
    if "added_tokens_decoder" not in values:
        special = {token.content for token in (*named.values(), *extra)}
        for text, number in _mapping(
            beside.get("added_tokens.json", {}), "added_tokens.json"
        ).items():
            table[_id(number, "added_tokens.json")] = AddedToken(
                text, normalized=text not in special, special=text in special
            )
    _add(
        backend, table, [*(named[name] for name in NAMED if name in named), *named.values(), *extra]
    )
    return Declared(
        {name: token.content for name, token in named.items()},
        *_templates(settings, beside, templates),
    )


def _add(
    backend: tokenizers.Tokenizer, table: Mapping[int, AddedToken], named: list[AddedToken]
) -> None:
    """Add the tokens that the backend lacks."""
    there = backend.get_added_tokens_decoder()
    known, same = (
        {token.content for token in there.values()},
        {repr(token) for token in there.values()},
    )
    wanted = [token for _, token in sorted(table.items()) if repr(token) not in same]
    known |= {token.content for token in wanted}
    special = {token.content for token in named}
    for token in named:
        if token.content not in known:
            wanted.append(token)
            known.add(token.content)
    for token in wanted:
        token.special = token.special or token.content in special
    backend.add_tokens([token for token in wanted if token.content])
    for number, token in table.items():
        if token.content and backend.token_to_id(token.content) != number:
            _refuse(
                f"the id of {token.content!r}",
                f"{number}, as declared",
                backend.token_to_id(token.content),
            )


def _templates(
    settings: Mapping[str, Json], beside: Mapping[str, Json], templates: Mapping[str, str]
) -> tuple[str | None, dict[str, str]]:
    """The default template, or None, and the others by name."""
    found, by_name = settings.get("chat_template"), dict[str, Json]()
    if not templates and found is None:
        found = _mapping(beside.get("chat_template.json", {}), "chat_template.json").get(
            "chat_template"
        )
    if templates:
        by_name |= templates
    elif isinstance(found, list):  # several, by name
        entries = [entry for entry in found if isinstance(entry, dict)]
        by_name |= {
            entry["name"]: entry.get("template")
            for entry in entries
            if isinstance(entry.get("name"), str)
        }
    else:
        by_name |= {} if found is None else {"default": found}
    for name, text in by_name.items():
        if not isinstance(text, str):
            _refuse(f"chat_template {name!r}", "a string", f"a {type(text).__name__}")
    return by_name.pop("default", None), by_name


def _token(value: object, where: str, special: bool = False) -> AddedToken:
    """A token of a file: its text, or what a release of transformers wrote of it."""
    if isinstance(value, str) and special:
        return AddedToken(value, special=True)
    flags = dict(_mapping(value, where))
    flags.pop("__type", None)
    flags.pop("id", None)
    content = flags.pop("content", None)
    if (
        not isinstance(content, str)
        or not all(isinstance(flag, bool) for flag in flags.values())
        or not flags.keys() <= FLAGS
    ):
        _refuse(
            f"a token of {where}",
            f"a text with flags among {', '.join(sorted(FLAGS))}",
            str(value)[:100],
        )
    return AddedToken(content, **{**flags, "special": special or flags.get("special", False)})


def _mapping(value: object, where: str) -> Mapping[str, Json]:
    if not isinstance(value, dict):
        _refuse(where, "an object", f"a {type(value).__name__}")
    return value


def _id(value: object, where: str) -> int:
    number = (
        int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 11 else value
    )
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**32:
        _refuse(f"an added token's id in {where}", "a token id", repr(value)[:50])
    return number


def _refuse(what: str, wanted: str, got: object) -> NoReturn:
    remedy = (
        "Save the tokenizer again: "
        "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
    )
    fail("load", what, wanted, got, remedy, CheckpointError)
