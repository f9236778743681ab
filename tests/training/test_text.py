"""The tokenizer of characters: there and back, also through a folder on disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import funcattn as fa
from funcattn.training import characters

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(TEXTS)
def test_characters_come_back(text):
    tokenizer = characters(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocabulary == len({*text, "\ufffd"})


def test_a_foreign_character_is_one_unknown_token():
    tokenizer = characters("abc")
    assert tokenizer.decode(tokenizer.encode("a€c")) == "a\ufffdc"


def test_a_saved_model_of_characters_reads_the_same(tmp_path):
    tokenizer = characters("a line\nand  another\t<end>")
    config = fa.Config(
        vocabulary=tokenizer.vocabulary,
        width=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_size=8,
        feed_forward=8,
    )
    fa.save(tmp_path / "model", config, fa.decoder(config).init(fa.key(0)), tokenizer)
    again = fa.load(tmp_path / "model").tokenizer
    text = "other\n  hand\t"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize(("text", "message"), [("", "got an empty one"), (b"abc", "got a bytes")])
def test_a_mistake_is_one_clear_error(text, message):
    with pytest.raises(ValueError, match=f"characters: text should be a text, {message}"):
        characters(text)
