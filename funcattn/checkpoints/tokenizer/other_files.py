"""The tokenizer of a folder without tokenizer.json: which file it is in, as the text of a
tokenizer.json.
"""

from collections.abc import Mapping
from pathlib import Path

from ..families.tables import Json
from ..regular_files import LARGE, read_bytes, read_text
from . import byte_level_files, ranked, sentencepiece_model, word_pieces
from .declared import OTHERS

Made = tuple[str, dict[str, Json]]  # the text of tokenizer.json, and tokenizer_config.json


def as_tokenizer_json(
    folder: Path, model_type: Json, settings: Mapping[str, Json], beside: Mapping[str, Json]
) -> Made | None:
    """tokenizer.json and tokenizer_config.json of the files of a folder, or None where they are
    another tokenizer.

    Args:
        model_type: of config.json. settings: tokenizer_config.json.
        beside: the values of the files of `declared.BESIDE` that are there, by name.

    Raises:
        CheckpointError: a file is damaged.
    """
    if kind := byte_level_files.class_of(folder, model_type, settings):
        text = byte_level_files.as_tokenizer_json(folder, settings, kind)
        return text, byte_level_files.with_roles(settings, beside, kind)
    there = [name for name in OTHERS if (folder / name).is_file()]
    if ranked.TEKKEN in there:
        text, roles = ranked.from_tekken(read_text(folder / ranked.TEKKEN, LARGE))
        return text, _with(settings, beside, roles)
    if ranked.QWEN in there or ranked.MODEL in there:
        name = ranked.QWEN if ranked.QWEN in there else ranked.MODEL
        data = read_bytes(folder / name, LARGE)
        if name == ranked.QWEN or ranked.is_tiktoken(data):
            text = ranked.from_tiktoken(data, name, model_type, settings)
            return None if text is None else (text, dict(settings))
        made = sentencepiece_model.as_tokenizer_json(data, settings)
        return (made[0], _with(settings, beside, made[1])) if isinstance(made, tuple) else None
    if word_pieces.FILE in there and word_pieces.is_read(model_type, settings):
        text = read_text(folder / word_pieces.FILE, LARGE)
        return word_pieces.as_tokenizer_json(text, settings, beside)
    return None


def _with(
    settings: Mapping[str, Json], beside: Mapping[str, Json], roles: Mapping[str, str]
) -> dict[str, Json]:
    """tokenizer_config.json with the special tokens of the file that none names."""
    named = {**beside.get("special_tokens_map.json", {}), **settings}
    return {**{name: text for name, text in roles.items() if name not in named}, **settings}
