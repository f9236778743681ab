"""WordPiece, from tokenizer.json and from vocab.txt: the ids of transformers in many scripts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import CONFIG, params
from transformers import BertTokenizer

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.tokenizer.tokenizer import from_files
from funcattn.checkpoints.tokenizer.word_pieces import as_tokenizer_json

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "thelonăéeа日本привет한12,.'ß!"
WORDS = ["the", "hello", "##llo", "##lo", "при", "##вет", "the日", "Hello"]
LINES = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
VOCABULARY = {token: number for number, token in enumerate(dict.fromkeys(LINES))}
TEXT = "".join(f"{token}\n" for token in VOCABULARY)
SETTINGS = {
    "small letters": {},
    "as they are": {"do_lower_case": False},
    "accents": {"do_lower_case": True, "strip_accents": False},
    "Chinese": {"tokenize_chinese_chars": False},
}
SCRIPTS = st.text("the lohelloÉéăß 12日本привет한국☃🙂\t\n\u3000,.!'[]SEP\u0301İ", max_size=24)


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("case", SETTINGS)
def test_ids_are_those_of_transformers(case, file):
    theirs = BertTokenizer(vocab=dict(VOCABULARY), **SETTINGS[case])
    said = {"tokenizer_class": "BertTokenizer", **SETTINGS[case]}
    made = as_tokenizer_json(TEXT, said, {})
    if file == "tokenizer.json":
        made = (theirs.backend_tokenizer.to_str(), made[1])
    ours = from_files(made[0], made[1], {}, [])

    @given(SCRIPTS)
    def holds(text):
        if not any(token in text for token in SPECIAL):  # plain text here, in `encode`
            assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.backend_tokenizer.decode(ids, skip_special_tokens=True)

    holds()
    assert ours.encode("[SEP]")[1:-1] != [VOCABULARY["[SEP]"]]


def folder(tmp_path, text=TEXT, **settings):
    fa.save(tmp_path / "m", CONFIG, params())
    (tmp_path / "m" / "vocab.txt").write_text(text)
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "m"


def test_a_folder_has_it(tmp_path):
    found = fa.load(folder(tmp_path, tokenizer_class="BertTokenizer")).tokenizer
    ids = [VOCABULARY[token] for token in ("[CLS]", "the", "hello", "!", "[SEP]")]
    assert found.encode("The HELLO!") == ids
    assert found.roles["cls_token"] == "[CLS]"


def test_another_class_is_told_of(tmp_path):
    with pytest.warns(UserWarning, match=r"got vocab\.txt"):
        assert fa.load(folder(tmp_path, tokenizer_class="BertJapaneseTokenizer")).tokenizer is None


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("the\n", {}),
        (TEXT.replace("[CLS]", "[cls]"), {}),
        (TEXT, {"do_lower_case": "no"}),
        (TEXT, {"cls_token": 3}),
    ],
    ids=["no unknown", "no beginning", "a flag", "a role"],
)
def test_a_damaged_file_is_refused(text, settings):
    with pytest.raises(CheckpointError, match="load: "):
        as_tokenizer_json(text, settings, {})
