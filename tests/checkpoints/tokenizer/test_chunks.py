"""Long texts: encoded in chunks they have the ids, offsets and mask of the whole."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from funcattn.checkpoints import Tokenizer
from funcattn.checkpoints.tokenizer import chunks
from funcattn.checkpoints.tokenizer.tokenizer_json import LLAMA3, QWEN2

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]
    ),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES]
    ),
}


def made(split, normalizer=None, **flags):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ġ", "a"),
        ("a", "b"),
        ("Ġ", "Ġ"),
        ("b", "Ġ"),
        ("Ċ", "Ċ"),
        ("Ġ", "ab"),
        ("1", "2"),
        ("'", "s"),
        (".", "Ċ"),
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate([*letters, *map("".join, merges)])},
            merges=merges,
        )
    )
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(
        [AddedToken(token, special=True, **flags) for token in ("<s>", "</s>", "<t>x")]
    )
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", ends)
    return backend


pieces = [
    "a",
    "b",
    " ",
    "  ",
    "\n",
    ".",
    "1",
    "'s",
    "é",
    "\u0301",
    "<t>x",
    "</s>",
    "ab ab",
    "黑",
    "\t",
    "\u00a0",
    ",",
    "。",
    "\r\n",
    "\x1c",
    "\u2003",
    "_",
    "Ⅷ",
    "²",
    "'",
]
texts = st.lists(st.sampled_from(pieces), max_size=30).map("".join)


@pytest.mark.parametrize(
    "flags", [{}, {"lstrip": True}, {"single_word": True}, {"normalized": True}], ids=str
)
@pytest.mark.parametrize("split", SPLITS)
@given(text=texts, ends=st.booleans())
def test_a_text_in_chunks_is_encoded_as_the_whole(split, flags, text, ends):
    for normalizer in (None, normalizers.NFC()):
        backend = made(SPLITS[split](), normalizer, **flags)
        assert chunks.is_local(backend)
        whole = backend.encode(text, add_special_tokens=ends)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "CHUNK", 3)
            found = chunks.encode(backend, text, add_special_tokens=ends)
        assert found.ids == whole.ids
        inside = [i for i, added in enumerate(whole.special_tokens_mask) if not added]
        assert [tuple(found.offsets[i].tolist()) for i in inside] == [
            whole.offsets[i] for i in inside
        ]
        assert found.mask == whole.special_tokens_mask


OTHERS = {
    "no split": made(BYTES),
    "a space first": made(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another pattern": made(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), BYTES])
    ),
    "a normalizer": made(SPLITS["gpt2"](), normalizers.Prepend("x")),
    "tokens that take spaces in": made(SPLITS["gpt2"](), rstrip=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_where_a_cut_would_be_seen_the_text_is_whole_or_refused(name, monkeypatch):
    backend = OTHERS[name]
    monkeypatch.setattr(chunks, "CHUNK", 3)
    text = "ab ab a <t>x ab"
    assert chunks.encode(backend, text, add_special_tokens=True).ids == backend.encode(text).ids
    monkeypatch.setattr(chunks, "MAX_LETTERS", 14)
    with pytest.raises(
        ValueError,
        match="text should be of at most 14 letters that this tokenizer cannot cut, got 15",
    ):
        Tokenizer(backend).encode(text)


def test_no_chunk_is_longer_than_it_should_be(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 100)
    sizes = []

    class Counted:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def encode(self, text, **options):
            sizes.append(len(text))
            return self.backend.encode(text, **options)

    chunks.encode(Counted(made(SPLITS["gpt2"]())), "ab a " * 1000, add_special_tokens=False)
    assert max(sizes) < 110


def test_a_word_without_a_place_to_cut_is_bounded_too(monkeypatch):
    backend = made(SPLITS["gpt2"]())
    monkeypatch.setattr(chunks, "CHUNK", 3)
    monkeypatch.setattr(chunks, "MAX_LETTERS", 14)
    # two pieces
    assert chunks.encode(backend, "a" * 8 + " " + "b" * 8, add_special_tokens=False).ids
    with pytest.raises(
        ValueError, match="at most 14 letters that this tokenizer cannot cut, got 40"
    ):
        chunks.encode(backend, "a" * 40, add_special_tokens=False)


def test_a_token_that_is_a_word_of_its_own_looks_at_what_is_before_it():
    backend = made(SPLITS["gpt2"]())
    assert chunks.is_local(backend)
    backend.add_special_tokens([AddedToken(".x", special=True, single_word=True)])
    assert not chunks.is_local(backend)


def test_a_last_piece_without_ids_has_nothing_put_first_again(monkeypatch):
    """The vocabulary lacks the bytes of its end."""
    backend = made(SPLITS["gpt2"]())
    letters = {token: i for i, token in enumerate(["a", "b", "\u0120"])}
    backend.model = models.BPE(vocab=letters, merges=[])
    monkeypatch.setattr(chunks, "CHUNK", 3)
    text = "aaaa,,"
    assert chunks.encode(backend, text, add_special_tokens=True).ids == backend.encode(text).ids
