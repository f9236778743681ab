"""The tokenizer of a GPT-2 folder that has vocab.json and merges.txt, and no tokenizer.json.

Other models keep such files too, with other patterns (Qwen2, RoBERTa, CLIP): only GPT-2's are read.

Source: transformers, models/gpt2/tokenization_gpt2.py, GPT2Tokenizer.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ..families.tables import Json
from ..regular_files import LARGE, read_json, read_text

VOCABULARY, MERGES = "vocab.json", "merges.txt"
CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
END = "<|endoftext|>"  # what GPT2Tokenizer names its special tokens where no file says so
ROLES = ("unk_token", "bos_token", "eos_token")


def is_gpt2(folder: Path, model_type: Json, settings: Mapping[str, Json]) -> bool:
    """True for both files of a GPT-2, whose tokenizer puts nothing before a text.

    Args:
        model_type: as config.json says. settings: tokenizer_config.json.
    """
    files = all((folder / name).is_file() for name in (VOCABULARY, MERGES))
    plain = settings.get("tokenizer_class") in CLASSES and not settings.get("add_bos_token")
    return files and plain and model_type == "gpt2"


def as_tokenizer_json(folder: Path, settings: Mapping[str, Json]) -> str:
    """The text of tokenizer.json for the two files.

    Raises:
        CheckpointError: a file is damaged.
    """
    model = {
        "type": "BPE",
        "vocab": read_json(folder / VOCABULARY, LARGE),
        "fuse_unk": False,
        "byte_fallback": False,
    }
    lines = read_text(folder / MERGES, LARGE).split("\n")
    begin = 1 if lines[0].startswith("#version") else 0
    model["merges"] = [line.strip("\r") for line in lines[begin:] if line.strip()]
    empty = tokenizers.Tokenizer(models.BPE())
    empty.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=settings.get("add_prefix_space") is True
    )
    empty.decoder = decoders.ByteLevel()
    return json.dumps(
        {**json.loads(empty.to_str()), "model": {**json.loads(empty.to_str())["model"], **model}}
    )


def with_roles(settings: Mapping[str, Json], beside: Mapping[str, Json]) -> dict[str, Json]:
    """tokenizer_config.json with the special tokens that GPT2Tokenizer has where no file names
    them.
    """
    named = {**beside.get("special_tokens_map.json", {}), **settings}
    return {**{role: END for role in ROLES if role not in named}, **settings}
