"""Each field of a file is read as the kind that it must be: any other is refused by a
CheckpointError that names it.
"""

import json

import numpy as np
import pytest
import torch
from gguf_bytes import field, file
from samples import CONFIG, TOKENS, metadata, params, tokenizer, write_gguf

import funcattn as fa
from funcattn import serving, speculation
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.gguf.header import read_header
from funcattn.checkpoints.tokenizer.gguf_metadata import from_metadata
from funcattn.families import read_metadata

ODD = [True, False, 0, -1, 2.5, 2**40, "x", "", [], ["x"]]  # what a field of GGUF may hold
ODD += [
    np.array([1], np.int32),
    np.array([0.5], np.float32),
    np.array([True]),
    np.array([], np.int64),
]
OTHERS = [
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.scores",
]
OTHERS += [
    "tokenizer.ggml.add_space_prefix",
    "llama.attention.value_length",
    "llama.rope.scaling.type",
    "llama.expert_count",
]
OTHERS += ["llama.rope.scaling.factor", "llama.attention.causal"]


def outcome(load):
    """The message of a CheckpointError, or "" where it loads; anything else is raised."""
    try:
        load()
        return ""
    except CheckpointError as error:
        return str(error)


def read(fields):
    read_metadata(fields, CONFIG.vocabulary, True)
    from_metadata(fields)


@pytest.mark.parametrize("field", [*metadata(), *OTHERS])
def test_a_field_of_gguf_of_another_kind_is_refused_or_read(field):
    plain = {
        "tokenizer.ggml.scores": np.ones(len(TOKENS), np.float32),
        "tokenizer.ggml.model": "llama",
    }
    kinds = (metadata(), {**metadata(), **plain})
    told = [
        outcome(lambda value=value, fields=fields: read({**fields, field: value}))
        for value in ODD
        for fields in kinds
    ]
    assert any(field in one for one in told)


BOOLS = [
    "general.alignment",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eom_token_id",
]
BOOLS += ["llama.block_count", "llama.rope.freq_base", "split.count"]


@pytest.mark.parametrize("field", BOOLS)
def test_a_bool_is_no_number(field, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", change={field: True})
    assert field.replace("split.count", "split file") in outcome(lambda: fa.load(path))


@pytest.mark.parametrize("value", [1, 0, "true", np.array([1], bool)])
@pytest.mark.parametrize(
    "field", ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"]
)
def test_a_number_is_no_bool(field, value):
    assert field in outcome(lambda: from_metadata({**metadata(), field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_type", np.ones(len(TOKENS), np.float32)),
        ("token_type", np.ones(len(TOKENS), bool)),
        ("token_type", np.ones((len(TOKENS), 1), np.int32)),
        ("scores", np.ones(len(TOKENS), np.int32)),
        ("scores", np.full(len(TOKENS), np.nan, np.float32)),
    ],
)
def test_numbers_of_another_kind_are_none(field, value):
    fields = {
        **metadata(),
        "tokenizer.ggml.scores": np.ones(len(TOKENS), np.float32),
        "tokenizer.ggml.model": "llama",
    }
    assert field in outcome(lambda: from_metadata({**fields, f"tokenizer.ggml.{field}": value}))


def test_an_alignment_of_an_array_is_named():
    assert "general.alignment" in outcome(
        lambda: read_header(file([field("general.alignment", 9, "IQI", 4, 1, 32)]), "x.gguf")
    )


@pytest.mark.parametrize(
    "name", ["a:b", "<bos:1>", "$A:x", "$A", "$B", "$0", "::", "a:", ":1", "$:1"]
)
def test_a_token_that_begins_a_text_may_have_any_name(name):
    tokens = [*TOKENS]
    tokens[2] = name
    ours = from_metadata(
        {**metadata(), "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_bos_token": True}
    )
    plain = from_metadata({**metadata(), "tokenizer.ggml.add_bos_token": False})
    assert ours.encode("hello") == [2, *plain.encode("hello")]


# The files of a folder.

JSON = [
    None,
    True,
    0,
    -1,
    2.5,
    float("nan"),
    10**30,
    "x",
    "",
    [],
    [None],
    [True],
    [{}],
    ["x"],
    [["x"]],
    {},
    {"a": 1},
    {"content": 3},
]
FIELDS = {
    "config.json": [
        "model_type",
        "architectures",
        "eos_token_id",
        "quantization_config",
        "torch_dtype",
        "vocab_size",
        "rope_parameters",
    ],
    "generation_config.json": ["eos_token_id"],
    "tokenizer_config.json": [
        "chat_template",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "added_tokens_decoder",
    ],
}
NAMED = ["x", ["x"], {"a": 1}, None, 3, True]
TEMPLATES = [[{"name": name, "template": "y"}] for name in NAMED] + [
    [{"name": "default", "template": text}] for text in NAMED
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    fa.save(tmp_path_factory.mktemp("odd") / "m", CONFIG, params(), tokenizer())
    return tmp_path_factory.getbasetemp() / "odd0" / "m"


@pytest.mark.parametrize(
    ("file", "field"), [(file, field) for file in FIELDS for field in FIELDS[file]]
)
def test_a_field_of_a_folder_of_another_kind_is_named(folder, file, field):
    good = (folder / file).read_text()
    try:
        for value in [*JSON, *(TEMPLATES if field == "chat_template" else ())]:
            (folder / file).write_text(json.dumps({**json.loads(good), field: value}))
            told = outcome(lambda: fa.load(folder))
            assert not told or field in told or field.removesuffix("_type") in told, (value, told)
    finally:
        (folder / file).write_text(good)


@pytest.mark.parametrize("value", [3, [1], {"content": 3}, {}])
def test_a_token_that_is_no_text_is_named(folder, value):
    good = (folder / "tokenizer_config.json").read_text()
    try:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**json.loads(good), "bos_token": value})
        )
        assert value == {} or "bos_token" in outcome(lambda: fa.load(folder))
    finally:
        (folder / "tokenizer_config.json").write_text(good)


# Arguments.

MODEL = fa.decoder(fa.Config(layers=1))
DOORS = {
    "generate": lambda options: fa.generate(
        fa.key(0), MODEL, PARAMS, PROMPT, **{"steps": 2, **options}
    ),
    "stream": lambda options: list(
        fa.stream(fa.key(0), MODEL, PARAMS, PROMPT, **{"steps": 2, **options})
    ),
    "beam_search": lambda options: fa.beam_search(
        MODEL, PARAMS, PROMPT, **{"steps": 2, "beams": 2, **options}
    ),
    "best_of": lambda options: fa.best_of(
        fa.key(0),
        MODEL,
        PARAMS,
        PROMPT,
        **{"steps": 2, "n": 2, "sampler": fa.sampling.greedy, **options},
    ),
    "speculate": lambda options: fa.speculate(
        fa.key(0), MODEL, PARAMS, DRAFTER, PROMPT, **{"steps": 2, **options}
    ),
    "speculation.stream": lambda options: list(
        speculation.stream(fa.key(0), MODEL, PARAMS, DRAFTER, PROMPT, **{"steps": 2, **options})
    ),
    "serving.step": lambda options: serving.step(MODEL, PARAMS, SLOTS, **options),
}
PARAMS, PROMPT, DRAFTER = (
    MODEL.init(fa.key(0)),
    torch.tensor([1, 2]),
    fa.drafters.prompt_lookup(length=2),
)
SLOTS = serving.idle(MODEL, PARAMS, MODEL.cache(8), 2)


@pytest.mark.parametrize("stop", [(True,), (1.0,), ("a",), "a", 2, [None], (10**30,)], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_a_stop_that_is_no_id_is_refused(door, stop):
    with pytest.raises((TypeError, ValueError), match=r"stop should be (ids as ints|a sequence)"):
        DOORS[door]({"stop": stop})


@pytest.mark.parametrize(
    "option", [{"steps": True}, {"steps": 1.0}, {"chunk": True}, {"chunk": "a"}], ids=str
)
@pytest.mark.parametrize("door", ["generate", "stream", "speculate"])
def test_a_number_that_is_none_is_refused(door, option):
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        DOORS[door](option)
