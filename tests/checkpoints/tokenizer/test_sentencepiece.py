"""SentencePiece's tokenizer against its own rule, written out: join the neighbours with the highest
score, the left one first.
"""

import dataclasses
import itertools
import re
import time

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import CONFIG, metadata, params, write_gguf
from transformers import GemmaTokenizer

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.tokenizer.gguf_metadata import from_metadata
from funcattn.checkpoints.tokenizer.sentencepiece import SPACE, pieces, ranked_pairs

BYTES = [f"<0x{number:02X}>" for number in range(256)]
WORDS = [
    SPACE,
    *"helotw12,",
    f"{SPACE}t",
    "he",
    "ll",
    "hell",
    "hello",
    f"{SPACE}hello",
    f"{SPACE}th",
    "the",
    f"{SPACE}the",
    "12",
    "lo",
    "ow",
    "et",
    "21",
]
TURN = "<turn>"
TOKENS = ["<unk>", "<s>", "</s>", TURN, *BYTES, *WORDS]
KINDS = [2, 3, 3, 4, *[6] * 256, *[1] * len(WORDS)]
SCORES = [0.0] * (4 + 256) + [-float(number) for number in range(len(WORDS))]


def by_the_rule(text, leading_space=True):
    """Ids by SentencePiece's rule, one join at a time."""
    ids = {
        token: number
        for number, (token, kind) in enumerate(zip(TOKENS, KINDS, strict=True))
        if kind == 1
    }
    parts = list(((" " if leading_space and text else "") + text).replace(" ", SPACE))
    while True:
        joins = [
            (SCORES[ids[a + b]], -at)
            for at, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in ids
        ]
        if not joins:
            break
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [TOKENS.index(BYTES[byte]) for byte in part.encode()]
    return out


texts = st.lists(
    st.sampled_from([*"helotw12, zü☃", "hello", "low", "121", " the", "hellot", "ethe"]),
    max_size=12,
).map("".join)


@given(texts, st.booleans())
def test_a_text_is_cut_by_the_rule_and_comes_back(text, leading_space):
    backend = pieces(TOKENS, SCORES, KINDS, "<unk>", leading_space=leading_space)
    ids = backend.encode(text, add_special_tokens=False).ids
    assert ids == by_the_rule(text, leading_space)
    assert backend.decode(ids) == text


# Gemma 4: the same with pairs that are told.
FIRST = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
MANY = [*FIRST, *BYTES, *WORDS, "\n", "\n\n", "\n\n\n", f"e{SPACE}"]
CUTS = [(token[:at], token[at:]) for token in reversed(MANY[261:]) for at in range(1, len(token))]
PAIRS = [cut for cut in CUTS if set(cut) <= set(MANY)]


def of_gemma4(**change):
    fields = {
        "model": "gemma4",
        "tokens": MANY,
        "token_type": np.array([3, 3, 3, 2, 3, *[6] * 256, *[1] * (len(MANY) - 261)], np.int32),
        "scores": np.zeros(len(MANY), np.float32),
        "merges": [" ".join(pair) for pair in PAIRS],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "add_space_prefix": False,
        "add_bos_token": True,
    }
    return {
        f"tokenizer.ggml.{name}": value
        for name, value in {**fields, **change}.items()
        if value is not None
    }


def by_llama(text):
    """Ids as llm_tokenizer_bpe_session of llama.cpp finds them for Gemma 4."""
    out = []
    for word in re.findall(r"[^\n]+|\n+", text.replace(" ", SPACE)):
        parts = [word] if word in MANY and not word.strip("\n") else list(word)
        while True:
            ranks = [
                (PAIRS.index(pair), at)
                for at, pair in enumerate(itertools.pairwise(parts))
                if pair in PAIRS
            ]
            if not ranks:
                break
            at = min(ranks)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            found = [part] if part in MANY else [BYTES[byte] for byte in part.encode()]
            out += map(MANY.index, found)
    return out


GEMMA = GemmaTokenizer(vocab={token: i for i, token in enumerate(MANY)}, merges=PAIRS)
GEMMA4 = from_metadata(of_gemma4())


@given(st.lists(st.sampled_from([*"helotw12, zü☃\n", " the", "e t"]), max_size=12).map("".join))
def test_gemma_4_cuts_as_llama_cpp_and_the_original_do(text):
    ids = GEMMA4.encode(text)
    assert ids == [2, *by_llama(text)]
    assert ids == [2, *GEMMA.encode(text, add_special_tokens=False)]
    assert GEMMA4.decode(ids) == text


def test_a_text_of_gemma_4_begins_with_its_first_token_whatever_the_file_says():
    told = from_metadata(of_gemma4(add_bos_token=False, add_space_prefix=True))
    assert told.encode("the 12") == GEMMA4.encode("the 12")
    assert told.encode("the 12")[0] == 2


@pytest.mark.parametrize("merges", [None, ["the"], ["h e", "a b c"], ["x y"]])
def test_a_file_of_gemma_4_without_pairs_of_its_tokens_is_refused(merges):
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.merges"):
        from_metadata(of_gemma4(merges=merges))


def test_pieces_that_are_no_text_are_made_of_none():
    """A control token spelled out is its letters, though its parts are pieces."""
    tokens, kinds = [*BYTES, "<", "s", ">", "<s", "<s>"], [6] * 256 + [1, 1, 1, 1, 3]
    assert ranked_pairs(tokens, [0.0] * 261, kinds) == [("<", "s")]
    backend = pieces(tokens, [0.0] * 261, kinds, None, leading_space=False)
    assert backend.encode("<s>").ids == [259, 258]


def of_file(**more):
    named = {
        "model": "llama",
        "tokens": TOKENS,
        "token_type": np.array(KINDS, np.int32),
        "scores": np.array(SCORES, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in named.items() if value is not None}


def test_a_file_of_sentencepiece_is_a_tokenizer():
    tokenizer = from_metadata(of_file())
    # behind <s>, as llama.cpp does it
    assert tokenizer.encode("hello the 12") == [1, *by_the_rule("hello the 12")]
    assert tokenizer.decode(tokenizer.encode("hello the ☃")) == "hello the ☃"
    assert tokenizer.encode("<s>hello</s>", special=True)[-1] == 2
    assert 2 not in tokenizer.encode("hello</s>")  # what a document says is data
    assert tokenizer.stop == (2,)
    assert tokenizer.vocabulary == len(TOKENS)


def test_what_the_file_says_of_beginnings_is_kept():
    plain = from_metadata(of_file(add_bos_token=False, add_space_prefix=False))
    assert plain.encode("the") == by_the_rule("the", leading_space=False)
    assert from_metadata(of_file(add_bos_token=False)).encode("the") == by_the_rule("the")


def test_tokens_of_users_are_found_first():
    tokenizer = from_metadata(of_file(add_bos_token=False, add_space_prefix=False))
    assert tokenizer.encode(f"the{TURN}the") == [
        *by_the_rule("the", False),
        3,
        *by_the_rule("the", False),
    ]
    spaced = [*TOKENS[:3], SPACE * 2, *TOKENS[4:]]  # Gemma's runs of spaces are tokens of their own
    spaces = from_metadata(of_file(tokens=spaced, add_bos_token=False, add_space_prefix=False))
    assert spaces.encode("the  12") == [*by_the_rule("the", False), 3, *by_the_rule("12", False)]
    assert spaces.decode(spaces.encode("the  12")) == "the  12"


def test_a_saved_tokenizer_cuts_alike(tmp_path):
    tokenizer = from_metadata(of_file())
    config = dataclasses.replace(CONFIG, vocabulary=300)
    fa.save(tmp_path, config, params(config), tokenizer)
    again = fa.load(tmp_path).tokenizer
    for text in ("hello the 12", "zü ☃", ""):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(tokenizer.encode(text)) == text


def test_a_gguf_file_holds_it(tmp_path):
    absent = {name: None for name in metadata() if name.startswith("tokenizer.ggml.")}
    path = write_gguf(tmp_path / "a.gguf", change={**absent, **of_file()})
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "llama"
    assert fa.load(path).tokenizer.encode("hello the 12") == [1, *by_the_rule("hello the 12")]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scores": None}, "tokenizer.ggml.scores"),
        ({"scores": np.zeros(3, np.float32)}, "tokenizer.ggml.scores"),
        ({"token_type": None}, "tokenizer.ggml.token_type"),
        ({"tokens": ["a", "a"]}, "all different"),
        ({"unknown_token_id": 10**6}, "unknown_token_id"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(change, named):
    with pytest.raises(fa.families.CheckpointError, match=named):
        from_metadata(of_file(**change))


@given(st.lists(st.text("ab ", min_size=1, max_size=7), unique=True, max_size=40))
def test_the_pairs_are_all_cuts_whose_halves_are_pieces(tokens):
    cuts = [(token[:at], token[at:]) for token in tokens for at in range(1, len(token))]
    assert ranked_pairs(tokens, [0.0] * len(tokens), [1] * len(tokens)) == [
        cut for cut in cuts if set(cut) <= set(tokens)
    ]


def test_a_long_piece_takes_no_time():
    begun = time.perf_counter()  # a bound on a bomb: all cuts of 200 000 letters took ten seconds
    assert ranked_pairs(["a", "b", "a" * 1024], [0.0] * 3, [1] * 3) == []
    with pytest.raises(CheckpointError, match="at most 1024 letters"):
        ranked_pairs(["a", "b", "a" * 200_000], [0.0] * 3, [1] * 3)
    assert time.perf_counter() - begun < 2
