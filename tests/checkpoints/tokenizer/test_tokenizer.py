"""Text to ids and back: as transformers does it, reversibly, and never with a special token that
the text merely spells.
"""

import json
import re
from dataclasses import replace

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import KINDS, SPECIAL, TEMPLATE, TOKENS, metadata, tokenizer
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer

from funcattn.checkpoints import CheckpointError, Tokenizer
from funcattn.checkpoints.sources import locate
from funcattn.checkpoints.tokenizer.gguf_metadata import from_metadata
from funcattn.checkpoints.tokenizer.tokenizer import from_files

texts = st.text(st.characters(exclude_categories=["Cs"]))
spelled = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, "<|", "end|>", "<s", "s>"]), texts), max_size=6
).map("".join)
HELLO = [{"role": "user", "content": "hello"}]


def from_change(**change) -> Tokenizer:
    renamed = {("tokenizer.ggml." + name): value for name, value in change.items()}
    return from_metadata(
        {name: value for name, value in {**metadata(), **renamed}.items() if value is not None}
    )


# Against transformers.


@pytest.fixture(scope="module")
def oracle():
    """transformers' own conversion of the packaged file. It forgets that SmolLM splits digits
    (Digits in its tokenizer.json).
    """
    path = locate("smollm2-135m")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@given(texts.map(lambda text: "".join("x" if letter.isnumeric() else letter for letter in text)))
def test_text_without_digits_has_the_ids_of_transformers(smollm2, oracle, text):
    assert smollm2.tokenizer.encode(text) == oracle.encode(
        text, add_special_tokens=False, split_special_tokens=True
    )
    assert smollm2.tokenizer.encode(text, special=True) == oracle.encode(
        text, add_special_tokens=False
    )


@pytest.mark.parametrize(
    "text",
    [
        "x<|im_end|>y",
        "<|im_start|>user\nHello<|im_end|>\n",
        "<|endoftext|><|endoftext|>",
        "<repo_name>a",
    ],
)
def test_a_prompt_has_the_special_ids_of_transformers(smollm2, oracle, text):
    assert smollm2.tokenizer.encode(text, special=True) == oracle.encode(
        text, add_special_tokens=False
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        ("a1b22", ["a", "1", "b", "2", "2"]),
        # without the split of digits the second space would stand apart
        ("x  12", ["x", "ĠĠ", "1", "2"]),
        ("½²", ["Â½", "Â²"]),  # digits are what Unicode calls numeric
    ],
)
def test_smollm_takes_each_digit_alone(smollm2, text, tokens):
    backend = smollm2.tokenizer.backend
    assert [backend.id_to_token(number) for number in smollm2.tokenizer.encode(text)] == tokens


def test_the_packaged_template_renders_as_in_transformers(smollm2, oracle):
    messages = [
        *HELLO,
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": " x < y & 'so' "},
    ]
    for add in (True, False):
        wanted = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
        assert smollm2.tokenizer.chat(messages, add_generation_prompt=add) == wanted
    wanted = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2.tokenizer.prompt(messages) == wanted
    assert smollm2.tokenizer.stop == (
        oracle.eos_token_id,
        oracle.convert_tokens_to_ids("<|endoftext|>"),
    )


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2"])
def test_each_split_of_text_is_that_of_transformers(split):
    ours = from_change(pre=split, add_bos_token=False)
    told = {
        "tokenizer_type": "gpt2",
        "pre_tokenizer_type": split,
        "tokens": TOKENS,
        "merges": ours_merges(),
        "token_type": KINDS,
    }
    theirs, _ = convert_gguf_tokenizer("llama", told)

    @given(texts | st.text("he'S sl\n\t12 ë!", max_size=30))
    def agree(text):
        theirs.encode_special_tokens = True
        assert ours.backend.pre_tokenizer.pre_tokenize_str(
            text
        ) == theirs.pre_tokenizer.pre_tokenize_str(text)
        # its tokenizer.json normalizes to NFC, which the conversion leaves out
        if split != "qwen2":
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids

    agree()


def ours_merges() -> list[str]:
    return list(metadata()["tokenizer.ggml.merges"])


# By its own laws.


@given(spelled)
def test_a_text_comes_back_from_its_ids(text):
    assert tokenizer().decode(tokenizer().encode(text), skip_special=False) == text


@given(spelled)
def test_text_never_gives_the_id_of_a_special_token(text):
    assert not {TOKENS.index(token) for token in SPECIAL} & set(tokenizer().encode(text))


@given(
    st.lists(st.fixed_dictionaries({"role": spelled, "content": spelled}), min_size=1, max_size=3)
)
def test_no_message_writes_a_special_token_into_a_prompt(messages):
    ours = tokenizer()
    ids, special = ours.prompt(messages), {TOKENS.index(token) for token in SPECIAL}
    assert [number for number in ids if number in special] == [1, 0] * len(messages) + [1]
    assert ours.decode(ids, skip_special=False) == ours.chat(messages)  # nothing is lost


@given(st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), min_size=1, max_size=3))
def test_a_prompt_is_the_encoded_chat_where_no_message_spells_a_token(messages):
    ours = tokenizer()
    if not any(
        token in value for message in messages for value in message.values() for token in SPECIAL
    ):
        assert ours.prompt(messages) == ours.encode(ours.chat(messages), special=True)


def test_messages_of_parts_are_shielded_too():
    ours = replace(
        tokenizer(),
        template="{% for m in messages %}{% for p in m.content %}{{ p.text }}{% "
        "endfor %}<|end|>{% endfor %}",
    )
    assert (
        ours.prompt([{"role": "user", "content": [{"type": "text", "text": "a<|end|>b"}]}]).count(0)
        == 1
    )


def test_special_tokens_are_left_out_of_text_unless_asked_for():
    ids = tokenizer().encode("he<|end|>", special=True)
    assert ids[-1] == 0
    assert tokenizer().decode(ids) == "he"
    assert tokenizer().decode(torch.tensor(ids), skip_special=False) == "he<|end|>"


def test_ids_that_the_tokenizer_does_not_know_mean_no_text():
    assert tokenizer().decode([TOKENS.index("he"), 10**6]) == "he"
    with pytest.raises(ValueError, match=r"decode: ids should be token ids, got -1\."):
        tokenizer().decode([5, -1])


def test_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer().encode("a\ud800")
    with pytest.raises(TypeError, match="encode: text should be a str, got a list"):
        tokenizer().encode(["a"])
    with pytest.raises(TypeError, match="decode: ids should be token ids, got a str"):
        tokenizer().decode("abc")


@pytest.mark.parametrize("messages", ["Hello", [{"user": "Hello"}], ["Hello"]])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(
        TypeError, match=r"chat: messages should be messages such as \[.*, got .*Hello"
    ):
        tokenizer().prompt(messages)


def test_a_tokenizer_is_shown_in_one_line():
    assert repr(tokenizer()).startswith(f"Tokenizer(vocabulary={tokenizer().vocabulary}, stop=")
    assert len(repr(tokenizer())) < 100


def test_a_special_token_of_one_character_is_the_templates_alone():
    backend = tokenizers.Tokenizer.from_str(tokenizer().backend.to_str())
    backend.add_special_tokens(["☃"])
    ours = Tokenizer(backend, template="{% for m in messages %}{{ m.content }}☃{% endfor %}")
    ids = ours.prompt([{"role": "user", "content": "a☃☃"}])
    assert ids.count(backend.token_to_id("☃")) == 1
    assert ours.decode(ids, skip_special=False) == "a☃☃☃"


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(CheckpointError, match="template"):
        replace(tokenizer(), template=None).chat(HELLO)


# From GGUF metadata.


def test_kinds_of_tokens_are_kept():
    ours = from_change()
    # user-defined: whole wherever it stands
    assert ours.encode("<think>", special=True) == ours.encode("<think>") == [3]
    assert ours.decode([3, 0, 1]) == "<think>"  # and it is text, where control tokens are not
    assert (ours.vocabulary, ours.stop, ours.template) == (300, (0,), TEMPLATE)
    assert ours.roles == {"bos_token": "<s>", "eos_token": "<|end|>"}


def test_the_first_token_is_added_to_texts_where_the_file_says_so():
    plain = from_change().encode("hello")
    assert from_change(add_bos_token=True).encode("hello") == [2, *plain]
    assert from_change(add_bos_token=True).encode("hello", special=True) == plain
    assert from_change(pre="llama-bpe").encode("hello")[0] == 2  # Llama 3 by default
    assert from_change(pre="llama-bpe", add_bos_token=False).encode("hello")[0] != 2


def test_every_end_that_the_file_names_stops():
    assert from_change(eot_token_id=1, eom_token_id=0).stop == (0, 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"pre": "of-tomorrow"}, "of-tomorrow"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": [*TOKENS[:-1], "<s>"]}, "all different"),
        ({"token_type": None}, "token_type"),
        ({"token_type": "normal"}, "token_type"),
        ({"merges": ["a b c"]}, "'a b c'"),
        ({"merges": ["no such"]}, "tokenizer.ggml.merges"),
        ({"merges": 3}, "tokenizer.ggml.merges"),
        ({"eos_token_id": 300}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"eot_token_id": "end"}, "eot_token_id"),
    ],
    ids=str,
)
def test_metadata_of_no_tokenizer_is_refused_by_name(change, named):
    with pytest.raises(CheckpointError, match=re.escape(named)):
        from_change(**change)


# From and to files.


def again(ours: Tokenizer, **settings) -> Tokenizer:
    files = ours.files()
    values = {**json.loads(files["tokenizer_config.json"]), **settings}
    return from_files(files["tokenizer.json"], values, {}, ours.stop)


@given(spelled)
def test_a_tokenizer_comes_back_from_its_files(text):
    ours, back = tokenizer(), again(tokenizer())
    for special in (False, True):
        assert back.encode(text, special=special) == ours.encode(text, special=special)
    assert (back.stop, back.template, back.roles) == (ours.stop, ours.template, ours.roles)


def test_a_saved_tokenizer_is_read_by_transformers(tmp_path):
    ours = from_change(add_bos_token=True)
    ours.save(tmp_path / "new")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.encode("hello the 12") == ours.encode("hello the 12")
    assert theirs.apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True
    ) == ours.chat(HELLO)
    assert (theirs.eos_token, theirs.bos_token) == ("<|end|>", "<s>")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_padding_and_truncation_of_a_file_are_not_obeyed():
    values = json.loads(tokenizer().backend.to_str())
    values["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    values["padding"] = {
        "strategy": {"Fixed": 10**6},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    back = from_files(json.dumps(values), {}, {}, ())
    assert back.encode("hello the") == tokenizer().encode("hello the")


def test_merges_are_not_dropped_at_random():
    values = json.loads(tokenizer().backend.to_str())
    values["model"]["dropout"] = 0.9
    back = from_files(json.dumps(values), {}, {}, ())
    assert {tuple(back.encode("hello the hello")) for _ in range(20)} == {
        tuple(tokenizer().encode("hello the hello"))
    }


def test_a_panic_of_the_tokenizers_library_is_an_error_like_any_other(capfd):
    values = json.loads(tokenizer().backend.to_str())
    values["model"]["continuing_subword_prefix"] = "longer than any token"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        from_files(json.dumps(values), {}, {}, ())
    capfd.readouterr()  # Rust tells standard error about it


def test_the_end_is_the_eos_token_where_no_file_gives_ids():
    assert from_files(
        tokenizer().files()["tokenizer.json"], {"eos_token": {"content": "<|turn|>"}}, {}, ()
    ).stop == (1,)


@pytest.mark.parametrize(
    ("written", "template"),
    [
        ("a", "a"),
        ([{"name": "rag", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": "rag", "template": "b"}, 3], None),
        (None, None),
    ],
)
def test_a_template_is_found_in_any_spelling(written, template):
    assert again(tokenizer(), chat_template=written).template == template
    text = tokenizer().files()["tokenizer.json"]
    assert (
        from_files(text, {"chat_template": written}, {"default": "of a file"}, ()).template
        == "of a file"
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"type": "Magic"}}', "\x00"])
def test_a_file_of_no_tokenizer_is_refused(text):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        from_files(text, {}, {}, ())


def test_a_template_that_is_no_text_is_refused():
    with pytest.raises(CheckpointError, match="chat_template"):
        again(tokenizer(), chat_template={"a": 1})
