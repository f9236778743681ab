"""tekken.json and tiktoken's files: the ids of the algorithm on ranks, and of transformers'
converters.
"""

import base64
import itertools
import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.tokenizer.splits import TEKKEN
from funcattn.checkpoints.tokenizer.tokenizer_json import LLAMA3, QWEN2

WORDS = [b"ab", b" a", b"abc", b"bc", b" abc", b"  ", b"    ", b"12", b"123", "é".encode(), b"\n\n"]
WORDS += [
    b"'s",
    "漢".encode(),
    "漢字".encode(),
    b"th",
    b"the",
    b"he",
    b" the",
    b"aa",
    b"aaa",
    b"aaaa",
]
WORDS += [b"zqz"]  # of no two tokens: only a piece that is all of it is this token
TOKENS = [bytes([n]) for n in range(256)] + WORDS
TEXTS = [
    "abc the abc's 12345 aaaaaaa",
    "",
    " a  ab    abc\n\n\n漢字漢 é\r\n",
    "ABCabcThe THE's\t12 3/4...\n\nx",
    "xthebcbc  ",
    "zqz zqzq azqz",
]
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
CONFIG = fa.families.read_config(
    {
        "model_type": "llama",
        "vocab_size": 400,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
)


@pytest.fixture
def folder(tmp_path):
    fa.save(tmp_path / "m", CONFIG, fa.decoder(CONFIG).init(fa.key(0)))
    return tmp_path / "m"


def by_ranks(text, pattern, first=0):
    """Of each piece, join the neighbours whose join has the least rank until there are none."""
    ranks = {token: n + first for n, token in enumerate(TOKENS)}
    cut = Tokenizer(models.BPE())
    cut.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    ids = []
    for piece, _ in cut.pre_tokenizer.pre_tokenize_str(text):
        whole = piece.encode()
        parts = [whole] if whole in ranks else [bytes([byte]) for byte in whole]
        while len(parts) > 1:
            joins = [ranks.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
            if min(joins) == 10**9:
                break
            at = joins.index(min(joins))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def tekken(**changes):
    values = {
        "config": {
            "pattern": TEKKEN,
            "default_vocab_size": 8 + len(TOKENS),
            "default_num_special_tokens": 8,
        },
        "vocab": [
            {"rank": n, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for n, token in enumerate([*TOKENS, b"beyond"])
        ],
        "special_tokens": [
            {"rank": n, "token_str": text, "is_control": True} for n, text in enumerate(SPECIAL)
        ],
    }
    return json.dumps({**values, **changes})


def test_a_tekken_file_is_read_as_its_ranks_say_and_as_by_transformers(folder):
    (folder / "tekken.json").write_text(tekken())
    found, peer = fa.load(folder).tokenizer, convert_tekken_tokenizer(folder / "tekken.json")
    for text in TEXTS:
        ids = found.encode(text, special=True)
        assert ids == by_ranks(text, TEKKEN, 8)
        assert ids == peer(text, add_special_tokens=False)["input_ids"]
        assert found.encode(text) == [1, *ids]
        assert found.decode(ids) == text
    assert found.encode("[INST]ab</s><SPECIAL_7>", special=True) == [3, 8 + 256, 4 - 2, 7]
    assert 3 not in found.encode("[INST]")
    assert (found.roles["bos_token"], found.roles["eos_token"]) == ("<s>", "</s>")
    assert found.stop == (2,)


TABLE = {
    str(len(TOKENS) + 5 + n): {"content": text, "special": True}
    for n, text in enumerate(["<|begin_of_text|>", "<|eot_id|>"])
}


@pytest.mark.parametrize(
    ("name", "pattern"), [("qwen.tiktoken", QWEN2), ("tokenizer.model", LLAMA3)]
)
def test_a_file_of_tiktoken_is_read_as_its_ranks_say(folder, name, pattern, monkeypatch):
    lines = [b"%s %d" % (base64.b64encode(token), n) for n, token in enumerate(TOKENS)]
    (folder / name).write_bytes(b"\n".join([*lines, b""]))
    settings = {"added_tokens_decoder": TABLE, "eos_token": "<|eot_id|>"}
    settings |= {"bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = fa.load(folder).tokenizer
    ranks = {token: n for n, token in enumerate(TOKENS)}
    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", lambda *_: ranks)
    peer = TikTokenConverter("", pattern).converted()
    begin = [len(TOKENS) + 5] if name == "tokenizer.model" else []
    for text in TEXTS:
        ids = found.encode(text, special=True)
        assert ids == by_ranks(text, pattern) == peer.encode(text).ids
        assert found.encode(text) == begin + ids
        assert found.decode(ids) == text
    assert found.encode("ab<|eot_id|>", special=True) == [256, len(TOKENS) + 6]
    assert found.stop == (len(TOKENS) + 6,)


def test_a_file_of_tiktoken_without_its_special_tokens_is_told_of(folder):
    (folder / "tokenizer.model").write_bytes(b"YQ== 0\n")
    with pytest.warns(UserWarning, match=r"should be tokenizer\.json, got tokenizer\.model"):
        assert fa.load(folder).tokenizer is None


ONE = [{"rank": 0, "token_str": "<s>"}]
DAMAGED = {
    "no object": "[]",
    "no vocab": tekken(vocab=3),
    "no special tokens": tekken(special_tokens=None),
    "ranks": tekken(special_tokens=[{"rank": 1, "token_str": "<s>"}]),
    "a special token of nothing": tekken(special_tokens=[{"rank": 0, "token_str": ""}]),
    "two of one": tekken(special_tokens=[*ONE, {"rank": 1, "token_str": "<s>"}]),
    "one that is a token": tekken(special_tokens=[{"rank": 0, "token_str": "ab"}]),
    "no base64": tekken(vocab=[{"token_bytes": "*"}]),
    "a long token": tekken(vocab=[{"token_bytes": base64.b64encode(b"a" * 600).decode()}]),
    "few bytes": tekken(vocab=[{"token_bytes": "YQ=="}]),
    "a pattern": tekken(config={"pattern": "(a"}),
    "no pattern": tekken(config={}),
    "sizes": tekken(config={"pattern": TEKKEN, "default_vocab_size": 3}),
    "a size": tekken(config={"pattern": TEKKEN, "default_vocab_size": -3}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tekken_file_is_refused(folder, case):
    (folder / "tekken.json").write_text(DAMAGED[case])
    with pytest.raises(CheckpointError, match=r"load: .*tekken\.json"):
        fa.load(folder)
