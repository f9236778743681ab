"""vocab.json and merges.txt of GPT-2 and Qwen 2: the ids and texts of transformers for the same
folder.
"""

import json

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer

import funcattn as fa
from funcattn.checkpoints import CheckpointError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ a", "a b", "Ġ Ġ", "Ġa b", "# #", "' s", "1 2"]
VOCABULARY = {
    token: i
    for i, token in enumerate(
        [*LETTERS, *(line.replace(" ", "") for line in MERGES), "<|endoftext|>"]
    )
}
SETTINGS = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": len(VOCABULARY),
}
TEXTS = ["ab a  ab's 12 é黑\n\n<|endoftext|>##", "", " a", "ab<|endoftext|><|x|>"]


@pytest.fixture
def folder(tmp_path):
    config = fa.families.read_config(SETTINGS)
    fa.save(tmp_path / "m", config, fa.decoder(config).init(fa.key(0)))
    (tmp_path / "m" / "vocab.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "m" / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return tmp_path / "m"


CASES = {
    "alone": {},
    "a class": {
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}
    },
    "a space first": {"tokenizer_config.json": {"add_prefix_space": True}},
    "a map": {"special_tokens_map.json": {"eos_token": "<|x|>", "unk_token": "<|endoftext|>"}},
    "tokens added": {
        "added_tokens.json": {"<|x|>": len(VOCABULARY)},
        "tokenizer_config.json": {"pad_token": "<|x|>"},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_transformers(folder, case):
    for name, values in CASES[case].items():
        (folder / name).write_text(json.dumps(values))
    found, peer = fa.load(folder).tokenizer, GPT2Tokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = found.encode(text, special=True)
        assert ids == peer(text, add_special_tokens=False)["input_ids"]
        assert found.decode(ids, skip_special=False) == peer.decode(
            ids, clean_up_tokenization_spaces=False
        )
    assert found.roles["eos_token"] == peer.eos_token
    assert found.stop == (peer.eos_token_id,)
    assert set(found.special_tokens) == set(peer.all_special_ids)


QWEN_TEXTS = [*TEXTS, "cafe\u0301 I'LL  12\r\n x", "  \n\n ab's", "\u6f22\u5b57 12ab", "..\n\n!"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("Qwen2Tokenizer", {}), ("CodeGenTokenizer", {}), ("GPT2Tokenizer", {"pad_token": "<|x|>"})],
    ids=["Qwen2", "CodeGen", "GPT-2"],
)
def test_a_class_of_other_families_is_read_as_transformers_reads_it(folder, name, said):
    table = {
        str(len(VOCABULARY) + n): {
            "content": text,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for n, text in enumerate(["<|im_start|>", "<|im_end|>", "<|x|>"])
    }
    settings = {"tokenizer_class": name, "added_tokens_decoder": table, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **said}))
    found, peer = fa.load(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    for text in [*QWEN_TEXTS, "<|im_start|>user\nab<|im_end|>"]:
        ids = found.encode(text, special=True)
        assert ids == peer(text, add_special_tokens=False)["input_ids"]
        assert found.decode(ids, skip_special=False) == peer.decode(
            ids, clean_up_tokenization_spaces=False
        )
    for role in ("eos_token", "pad_token", "bos_token"):
        assert found.roles.get(role) == getattr(peer, role), role


def test_plain_text_spells_no_special_token(folder):
    tokenizer = fa.load(folder).tokenizer
    ids = tokenizer.encode(TEXTS[0])
    assert VOCABULARY["<|endoftext|>"] not in ids
    assert tokenizer.decode(ids) == TEXTS[0]


def test_merges_of_lines_that_end_as_in_windows_are_the_same(folder):
    ids = fa.load(folder).tokenizer.encode(TEXTS[0])
    (folder / "merges.txt").write_bytes(
        (folder / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    )
    assert fa.load(folder).tokenizer.encode(TEXTS[0]) == ids


@pytest.mark.parametrize(
    "settings", [{"tokenizer_class": "CLIPTokenizer"}, {"add_bos_token": True}], ids=str
)
def test_another_tokenizer_of_such_files_is_told_of(folder, settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"should be tokenizer\.json, got vocab\.json"):
        assert fa.load(folder).tokenizer is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("merges.txt", "#version: 0.2\na zz\n"),
        ("merges.txt", "abc\n"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": -1}'),
    ],
)
def test_damaged_files_are_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match="load: "):
        fa.load(folder)
