"""tokenizer.model: the pieces of a protocol buffer, written here byte by byte."""

import json

import pytest
from pieces_bytes import PIECES, WORDS, field, model, varint
from samples import CONFIG, params
from tokenizers import AddedToken
from tokenizers.models import BPE
from transformers import LlamaTokenizer

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.tokenizer.sentencepiece import ranked_pairs
from funcattn.checkpoints.tokenizer.sentencepiece_model import as_tokenizer_json


@pytest.fixture
def folder(tmp_path):
    fa.save(tmp_path / "m", CONFIG, params())
    return tmp_path / "m"


def read(folder, data, **settings):
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return fa.load(folder).tokenizer


def test_ids_are_those_of_transformers(folder):
    ours = read(folder, model(), tokenizer_class="LlamaTokenizer")
    tokens, scores, kinds = zip(*PIECES, strict=True)
    theirs = LlamaTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=ranked_pairs(tokens, scores, kinds),
    )
    theirs.add_tokens([AddedToken("<turn>", normalized=False)])
    assert isinstance(theirs.backend_tokenizer.model, BPE)
    for text in ("hello the 12", "thehello,  12\nzü☃", "the 12 hello"):
        assert ours.encode(text) == [1, *theirs.encode(text, add_special_tokens=False)]
        assert ours.decode(ours.encode(text)) == text
    assert ours.roles == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert ours.stop == (2,)
    assert ours.special_tokens == {1: "<s>", 2: "</s>"} | (
        {0: "<unk>"} if 0 in ours.special_tokens else {}
    )


def test_settings_and_the_normalizer_are_heeded(folder):
    plain = read(folder, model()).encode("hello")
    assert plain == [1, 260 + WORDS.index("▁hello")]
    assert read(folder, model(), add_bos_token=False).encode("hello") == plain[1:]
    bare = [1, 260 + WORDS.index("hello")]
    assert read(folder, model(space=0)).encode("hello") == bare
    assert read(folder, model(), add_prefix_space=False).encode("hello") == bare
    other = read(folder, model(ids=[(41, -1), (42, 3)]))
    assert (other.encode("hello"), other.stop) == (plain[1:], (3,))
    named = read(folder, model(), eos_token="<turn>", chat_template="{{ messages[0].content }}")
    assert named.stop == (3,)
    assert named.chat([{"role": "user", "content": "the"}]) == "the"


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"kind": 1}, {}),
        ({"spaces": 1}, {}),
        ({"charsmap": b"\0\0\0\0"}, {}),
        ({}, {"tokenizer_class": "T5Tokenizer"}),
        ({}, {"add_eos_token": True}),
    ],
    ids=str,
)
def test_what_would_be_another_tokenizer_is_told_of(folder, changes, settings):
    with pytest.warns(UserWarning, match=r"got tokenizer\.model"):
        assert read(folder, model(**changes), **settings) is None


DAMAGED = {
    "text": b"{}",
    "nothing": b"",
    "no pieces": model([]),
    "a length past the end": b"\x0a" + varint(2**62),
    "a number without an end": b"\x80" * 20,
    "a piece that is a number": field(1, 7) + model(),
    "a piece of bytes that are no text": field(1, field(1, b"\xff")) + model(),
    "a kind of none": field(1, field(1, b"x") + field(3, 9)) + model(),
    "a score that is a number": field(1, field(1, b"x") + field(2, 3)) + model(),
    "one piece twice": field(1, field(1, b"the")) + model(),
    "a score that is none": field(1, field(1, b"x") + field(2, float("nan"))) + model(),
    "an id of bytes": model(ids=[(41, b"x")]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused(case):
    with pytest.raises(CheckpointError):
        as_tokenizer_json(DAMAGED[case], {})


def test_a_file_cut_off_anywhere_is_refused_or_another(folder):
    data = model()
    for length in range(0, len(data), 97):
        try:
            as_tokenizer_json(data[:length], {})
        except CheckpointError:
            continue
