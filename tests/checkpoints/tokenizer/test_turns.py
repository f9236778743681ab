"""The tokens that end a turn in a GGUF file: named by the metadata, or known by their names."""

import numpy as np
import pytest
from samples import metadata, params, write_gguf

import funcattn as fa
from funcattn.checkpoints.tokenizer.gguf_metadata import from_metadata
from funcattn.checkpoints.tokenizer.turns import NAMES

TOKENS = ["<unk>", "<bos>", "<first end>", "<start>", "<second end>", "a", "b"]


def tokenizer(names=(), kind=3, **change):
    """A SentencePiece tokenizer whose tokens from the seventh on are `names`, of one kind."""
    tokens = [*TOKENS, *names]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": -np.arange(len(tokens), dtype=np.float32),
        "token_type": np.array([2, 3, 3, 3, 3, 1, 1, *[kind] * len(names)], np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **change,
    }
    return from_metadata({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


@pytest.mark.parametrize("kind", [3, 1, 4])
@pytest.mark.parametrize("name", sorted(NAMES - {"</s>"}))
def test_a_token_ends_a_turn_by_its_name_whatever_its_kind(name, kind):
    ours = tokenizer([name], kind)
    assert ours.stop == (2, 7)
    assert ours.encode(name, special=True) == [7]  # as the chat template writes it
    assert 7 not in ours.encode(name)  # and not as a message does


def test_a_token_of_html_ends_a_turn_where_it_is_a_control_token():
    assert tokenizer(["</s>"]).stop == (2, 7)
    assert tokenizer(["</s>"], kind=1).stop == tokenizer(["</s>"], kind=4).stop == (2,)


def test_the_ends_that_the_metadata_names_come_first_and_once():
    assert tokenizer(["<|im_end|>"], eot_token_id=4, eom_token_id=7).stop == (2, 4, 7)
    assert tokenizer(["<|eot_id|>", "<|eom_id|>"], eos_token_id=8).stop == (8, 7)


@pytest.mark.parametrize("others", [["<|return|>", "<|call|>"], ["<|calls|>", "<|flush|>"]])
def test_the_end_of_a_message_ends_no_turn_where_a_turn_has_several(others):
    assert tokenizer(["<|end|>", *others]).stop == (2, 8, 9)
    assert tokenizer(["<|end|>", others[0]]).stop == (2, 7, 8)


def test_a_token_of_html_ends_no_turn_beside_that_of_a_tool():
    assert tokenizer(["</s>", "<|tool_response>"]).stop == (2, 8)


@pytest.mark.parametrize(
    "name",
    [
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|im_start|>",
        "<start_of_turn>",
        "<end>",
    ],
)
def test_another_token_ends_no_turn(name):
    assert tokenizer([name]).stop == (2,)


def test_a_chat_with_a_file_that_names_the_end_of_texts_alone_ends_its_turn(tmp_path):
    tokens = [*metadata()["tokenizer.ggml.tokens"]]
    tokens[250] = "<end_of_turn>"
    loaded = fa.load(write_gguf(tmp_path / "a.gguf", change={"tokenizer.ggml.tokens": tokens}))
    assert loaded.tokenizer.stop == (0, 250)
    # all logits are 0
    bias = fa.tree.map_with_path(lambda path, x: x * 0 if path == "norm" else x, params())
    model, key = fa.decoder(loaded.config), fa.key(0)
    ends = fa.sampling.chain(fa.sampling.logit_bias({250: 100.0}), fa.sampling.greedy)
    pieces = list(
        fa.stream(
            key,
            model,
            bias,
            fa.tree.leaves(key)[0][:1].long() * 0,
            steps=9,
            sampler=ends,
            tokenizer=loaded.tokenizer,
        )
    )
    assert pieces[-1].tokens == (250,)
    assert pieces[-1].ended
