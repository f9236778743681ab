"""vocab.json and merges.txt of a byte-level tokenizer, where there is no tokenizer.json.

    GPT2Tokenizer, CodeGenTokenizer    words as GPT-2 cuts them
    Qwen2Tokenizer                     NFC, then words as Qwen 2 cuts them

The class is that of tokenizer_config.json, else that of the family in transformers. Others keep
such files too, with other patterns (RoBERTa, CLIP): they are not read.

Source: transformers, models/gpt2/tokenization_gpt2.py; models/qwen2/tokenization_qwen2.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ..families.tables import Json
from ..regular_files import LARGE, read_json, read_text
from .tokenizer_json import QWEN2

VOCABULARY, MERGES = "vocab.json", "merges.txt"
GPT2, QWEN = "GPT2Tokenizer", "Qwen2Tokenizer"
CLASSES = {
    **dict.fromkeys((GPT2, "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast"), GPT2),
    **dict.fromkeys((QWEN, "Qwen2TokenizerFast"), QWEN),
}
OF_FAMILY = {  # model_type -> the class of transformers where no file names one
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "codegen", "phi", "starcoder2"), GPT2),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), QWEN),
}
END = "<|endoftext|>"  # what these classes name their special tokens where no file says so
ROLES = {
    GPT2: ("unk_token", "bos_token", "eos_token"),
    QWEN: ("unk_token", "eos_token", "pad_token"),
}


def class_of(folder: Path, model_type: Json, settings: Mapping[str, Json]) -> str | None:
    """The class whose files these are, or None: both must be there, and nothing stand before a
    text.

    Args:
        model_type: as config.json says. settings: tokenizer_config.json.
    """
    if not all((folder / name).is_file() for name in (VOCABULARY, MERGES)):
        return None
    said = settings.get("tokenizer_class")
    found = OF_FAMILY.get(str(model_type)) if said is None else CLASSES.get(str(said))
    return None if settings.get("add_bos_token") else found


def as_tokenizer_json(folder: Path, settings: Mapping[str, Json], kind: str) -> str:
    """The text of tokenizer.json for the two files of a class.

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
    empty, space = tokenizers.Tokenizer(models.BPE()), settings.get("add_prefix_space") is True
    if kind == QWEN:
        empty.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        empty.pre_tokenizer = pre_tokenizers.Sequence([words, whole])
    else:
        empty.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    empty.decoder = decoders.ByteLevel()
    return json.dumps(
        {**json.loads(empty.to_str()), "model": {**json.loads(empty.to_str())["model"], **model}}
    )


def with_roles(
    settings: Mapping[str, Json], beside: Mapping[str, Json], kind: str
) -> dict[str, Json]:
    """tokenizer_config.json with the special tokens that the class has where no file names them."""
    named = {**beside.get("special_tokens_map.json", {}), **settings}
    return {**{role: END for role in ROLES[kind] if role not in named}, **settings}
