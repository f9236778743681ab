"""The text of a stream: for every decoder what is given out joins to the decoded whole, and ends
where a stop string is written.
"""

import contextlib
import itertools

import pytest
import tokenizers
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models

import funcattn as fa
from funcattn.checkpoints import CheckpointError, Tokenizer
from funcattn.decoding.detokenization import StreamedText, decoding_of, text_of

BYTES = [f"<0x{i:02X}>" for i in (0x0A, 0x09, 0x41, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xE2, 0xFF)]
WORDS = [
    "\u2581",
    "\u2581a",
    "\u2581\u2581b",
    "a",
    "b",
    "##c",
    "d</w>",
    ".",
    "n't",
    "|",
    "<pad>",
    "\ufffd",
    "'",
    " e",
    "Ġ",
    "Ã",
    "©",
    "ðŁ",
]
SPECIAL = ["<s>", "<|end|>"]
VOCABULARY = {token: i for i, token in enumerate([*BYTES, *WORDS, *SPECIAL])}
SPACES = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "none": None,
    "bytes": decoders.ByteLevel(),
    "llama": decoders.Sequence([*SPACES, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(SPACES),
    "strip of the beginning": decoders.Sequence([*SPACES, decoders.Strip(" ", 3, 0)]),
    "strip of the end": decoders.Sequence([*SPACES, decoders.Strip(" ", 0, 2)]),
    "strip of each": decoders.Sequence([decoders.Strip("a", 1, 0), decoders.Fuse()]),
    "strip of both": decoders.Sequence([*SPACES, decoders.Strip("e", 1, 1)]),
    "metaspace": decoders.Metaspace(),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "fallback and metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "wordpiece": decoders.WordPiece(cleanup=True),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "fallback alone": decoders.ByteFallback(),
    "replace": decoders.Sequence([decoders.Replace(Regex("[ab]+"), "x"), decoders.Fuse()]),
    "replace of all": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]),
    "fallback of all": decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
    "bytes of all": decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
}
ids = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=12)
stops = st.lists(
    st.sampled_from(
        ["a", "ab", " a", "b.", "<|end|>", "a<|end|>", "<|end|>b", "\n", "\ufffd", "<s><|end|>"]
    ),
    max_size=2,
)


def tokenizer(name) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    if DECODERS[name] is not None:
        backend.decoder = DECODERS[name]
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(backend)


def each(tokenizer, tokens):
    text = StreamedText(tokenizer)
    return [*(text.add(token)[0] for token in tokens), text.finish()]


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_given_out_joins_to_the_decoded_whole(name):
    ours = tokenizer(name)

    @given(ids)
    @example([0, 3, 4])  # a line break and half an emoji
    @example([14, 29, 12, 29, 14, 12])  # special tokens between spaces
    def joins(tokens):
        # the library fails on some texts that are stripped at their end
        with contextlib.suppress(CheckpointError):
            ours.decode(tokens)
            assert "".join(each(ours, tokens)) == ours.decode(tokens)

    joins()


@pytest.mark.parametrize("name", ["llama", "bytes", "wordpiece", "ctc"])
def test_text_is_given_out_as_soon_as_it_is_certain(name):
    pieces = each(tokenizer(name), [VOCABULARY[token] for token in ("\u2581a", "b", "a", "b")])
    assert all(pieces[:4])
    assert pieces[4] == ""


def test_a_run_of_bytes_waits_for_its_end():
    """Followed by a byte that ends no character it would be decoded otherwise."""
    tokens = [VOCABULARY[token] for token in ("a", "<0x0A>", "<0xC3>", "<0xA9>", "b")]
    assert each(tokenizer("llama"), tokens) == ["a", "", "", "", "\né" + "b", ""]


def test_a_tokenizer_of_transformers_streams_too():
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer("llama").backend)
    tokens = [
        VOCABULARY[token] for token in ("a", "<0x0A>", "<0xF0>", "<0x9F>", "b", "<0x0A>", "<0xC3>")
    ]
    assert "".join(each(theirs, tokens)) == theirs.decode(tokens)


def test_text_of_a_decoder_that_is_not_known_comes_at_the_end():
    for name in ("replace of all", "fallback of all", "bytes of all"):
        assert not decoding_of(tokenizer(name)).stepwise
    assert each(tokenizer("replace of all"), [VOCABULARY["a"], VOCABULARY["b"]]) == ["", "", "x"]


@given(ids, stops, st.sampled_from(["bytes", "llama", "wordpiece"]))
@example([13, 32], ["<|end|>"], "llama")
def test_no_text_that_is_given_out_holds_a_stop_string_and_none_is_lost_before_one(
    tokens, stop_strings, name
):
    ours = tokenizer(name)
    text = StreamedText(ours, stop_strings)
    n = next((n for n, token in enumerate(tokens, 1) if text.add(token)[1]), None)
    given_out = text_of(ours, tokens, stop_strings)
    assert not any(stop in given_out for stop in stop_strings if n is None or stop not in "\ufffd")
    whole = ours.decode(tokens if n is None else tokens[:n])
    assert whole.startswith(given_out)
    shown = [token for token in tokens if token not in ours.special_tokens]
    if n is None and shown == tokens and not any(stop in whole for stop in stop_strings):
        assert given_out == whole


# Through the model.


def writing(ids, vocabulary):
    """A model whose greedy text behind ids[0] is ids[1:]: each token is answered by the next of the
    chain.
    """
    size = {
        "width": vocabulary,
        "layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "head_size": 16,
        "feed_forward": 16,
        "tied": False,
    }
    model = fa.decoder(fa.Config(vocabulary=vocabulary, **size))
    zero = fa.tree.map(torch.zeros_like, model.init(fa.key(0)))
    head = torch.zeros(vocabulary, vocabulary)
    for before, after in itertools.pairwise(ids):
        head[after, before] = 1.0
    return model, zero._replace(
        embedding=torch.eye(vocabulary), norm=torch.ones(vocabulary), head=head
    )


def streams(tokens, ours, **options):
    """The pieces of fa.stream and of its speculative kin."""
    model, params = writing(tokens, 256)
    given = (
        torch.tensor(tokens[:1]),
        {"steps": len(tokens) - 1, "tokenizer": ours, "stop": (), **options},
    )
    yield list(fa.stream(fa.key(0), model, params, given[0], **given[1]))
    yield list(
        fa.speculation.stream(
            fa.key(0), model, params, fa.drafters.prompt_lookup(), given[0], **given[1]
        )
    )


@pytest.mark.parametrize(
    "tokens", [[1, 0x0A, 0xF0, 0x9F], [1, 0x41, 0x0A, 0xC3], [1, 0x0A, 0x09, 0xE2]]
)
def test_texts_of_a_stream_join_to_the_decoded_whole(tokens):
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={f"<0x{i:02X}>": i for i in range(256)}, merges=[], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for pieces in streams(tokens, Tokenizer(backend)):
        assert list(pieces[-1].tokens) == tokens[1:]
        assert "".join(piece.text for piece in pieces) == Tokenizer(backend).decode(tokens[1:])


@pytest.mark.parametrize(
    ("stop", "count", "text"), [("<|end|>", 3, "ab"), ("b<|end|>", 3, "a"), ("<|end|", 3, "ab")]
)
def test_a_stop_string_may_be_or_hold_a_special_token(stop, count, text):
    """As stop_strings of transformers: the text ends where the token is written, and the token is
    not part of it.
    """
    tokens = [VOCABULARY[token] for token in ("|", "a", "b", "<|end|>", "'")]
    for pieces in streams(tokens, tokenizer("gemma"), stop_strings=(stop,)):
        assert len(pieces[-1].tokens) == count
        assert pieces[-1].ended
        assert "".join(piece.text for piece in pieces) == text


def test_a_special_token_stands_between_texts_where_stop_strings_are_looked_for():
    tokens = [VOCABULARY[token] for token in ("a", "b", "<|end|>", "b", "a")]
    assert text_of(tokenizer("gemma"), tokens, ["<|end|>b"]) == "ab"
    assert text_of(tokenizer("gemma"), tokens, ["bb"]) == "abba"
    assert text_of(tokenizer("gemma"), tokens, ["b<s>", "<|end|>a"]) == "abba"
    assert text_of(None, tokens) == ""
