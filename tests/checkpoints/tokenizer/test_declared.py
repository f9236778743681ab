"""Special tokens and templates beside tokenizer.json: the ids and texts of transformers for the
same folder, or a refusal.
"""

import json
import re
import warnings

import pytest
import tokenizers
from samples import CONFIG, params
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

import funcattn as fa
from funcattn.checkpoints import CheckpointError

CHAT = [{"role": "user", "content": "hi <|x|>"}]
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
FLAGS = {"special": True, **PLAIN}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
LOOP = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(LETTERS)}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(["<s>"])
    fa.save(tmp_path / "m", CONFIG, params())
    backend.save(str(tmp_path / "m" / "tokenizer.json"))
    return tmp_path / "m"


def write(folder, settings, **files):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


NAMES = (
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ cls_token }}{{ "
    "mask_token }}{{ image_token }}"
)
CASES = {
    "special_tokens_map": (
        {},
        {"special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "<e>", **PLAIN}}},
    ),
    "more names": (
        {"image_token": "<img>", "mask_token": {"__type": "AddedToken", "content": "<m>", **FLAGS}},
        {"special_tokens_map": {"sep_token": "<sep>"}},
    ),
    "added_tokens_decoder": (
        {
            "added_tokens_decoder": {
                "256": {"content": "<s>", **FLAGS},
                "257": {"content": "<|x|>", **FLAGS},
            }
        },
        {},
    ),
    "a map that is not read": (
        {"added_tokens_decoder": {"256": {"content": "<s>", **FLAGS}}, "eos_token": "<a>"},
        {
            "special_tokens_map": {"eos_token": "<b>", "pad_token": "<p>"},
            "added_tokens": {"<|y|>": 257},
        },
    ),
    "added_tokens": ({"eos_token": "<e>"}, {"added_tokens": {"<e>": 257, "<|x|>": 258}}),
    "additional_special_tokens": (
        {"additional_special_tokens": ["<|x|>", "<|y|>"], "pad_token": "<p>"},
        {},
    ),
    "extra_special_tokens": (
        {"extra_special_tokens": ["<|x|>"]},
        {"special_tokens_map": {"additional_special_tokens": ["<|z|>"]}},
    ),
    "extra names": ({"extra_special_tokens": {"image_token": "<img>"}, "bos_token": "<s>"}, {}),
    "other flags": (
        {"added_tokens_decoder": {"256": {"content": "<s>", **FLAGS, "lstrip": True}}},
        {},
    ),
    "of the vocabulary": ({"eos_token": "!"}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_declared_beside_has_the_ids_of_transformers(folder, name):
    settings, files = CASES[name]
    write(
        folder,
        {
            "chat_template": f"{NAMES} <s> <e> <|x|><|y|><|z|><img>{LOOP[:-12]}<|x|>{{% endfor %}}",
            **settings,
        },
        **files,
    )
    theirs, ours = AutoTokenizer.from_pretrained(folder), fa.load(folder).tokenizer
    said = [{"role": "user", "content": "hi"}]
    assert (
        ours.prompt(said)
        == theirs.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    )
    assert ours.chat(said) == theirs.apply_chat_template(
        said, add_generation_prompt=True, tokenize=False
    )
    added = {
        number: str(token) for number, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert ours.special_tokens == added
    assert ours.stop == (() if theirs.eos_token is None else (theirs.eos_token_id,))


@pytest.mark.parametrize(
    ("settings", "files", "named"),
    [
        (
            {"added_tokens_decoder": {"300": {"content": "<|x|>", **FLAGS}}},
            {},
            "the id of '<|x|>' should be 300",
        ),
        ({"added_tokens_decoder": {"257": "<|x|>"}}, {}, "added_tokens_decoder"),
        ({"added_tokens_decoder": []}, {}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, {}, "an added token's id"),
        ({"added_tokens_decoder": {"257": {"content": 3}}}, {}, "a token of added_tokens_decoder"),
        (
            {"added_tokens_decoder": {"257": {"content": "a", "magic": True}}},
            {},
            "a token of added_tokens_decoder",
        ),
        ({}, {"added_tokens": {"<|x|>": 999}}, "the id of '<|x|>' should be 999"),
        ({"split_special_tokens": True}, {}, "split_special_tokens"),
        ({}, {"chat_template": {"chat_template": 3}}, "chat_template"),
    ],
    ids=str,
)
def test_a_declaration_that_cannot_be_kept_is_refused_by_name(folder, settings, files, named):
    write(folder, settings, **files)
    with pytest.raises(CheckpointError, match=rf"load: .*{re.escape(named)}"):
        fa.load(folder)


def test_templates_are_read_in_the_order_of_transformers(folder):
    chat = lambda: (lambda ours: ours.template and ours.decode(ours.prompt(CHAT)))(
        fa.load(folder).tokenizer
    )
    write(folder, {}, chat_template={"chat_template": "json" + LOOP})
    assert chat() == "json[hi <|x|>]"
    write(folder, {"chat_template": "config" + LOOP})
    assert chat() == "config[hi <|x|>]"
    (folder / "chat_template.jinja").write_text("jinja")
    assert chat() == "jinja"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert chat() == "jinja"
    (folder / "chat_template.jinja").unlink()
    assert chat() is None  # transformers: several, and none is the default
    (folder / "additional_chat_templates" / "default.jinja").write_text("default")
    assert chat() == "default"


def test_templates_whose_names_are_no_names_are_none(folder):
    named = [
        {"name": ["default"], "template": "x"},
        {"name": {}, "template": "y"},
        {"template": "z"},
        3,
    ]
    write(folder, {"chat_template": named})
    assert fa.load(folder).tokenizer.template is None
    write(folder, {"chat_template": [*named, {"name": "default", "template": "w"}]})
    assert fa.load(folder).tokenizer.template == "w"


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt"])
def test_a_tokenizer_in_another_layout_is_told_of(folder, name):
    (folder / "tokenizer.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fa.load(folder).tokenizer is None
    (folder / name).write_text("{}")
    with pytest.warns(
        UserWarning, match=rf"should be tokenizer\.json, got {re.escape(name)}"
    ) as told:
        assert fa.load(folder).tokenizer is None
    assert told[0].filename == __file__
