"""What a model's files hold, without their weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import write_gguf

import funcattn as fa
from funcattn.checkpoints.surveying import survey
from funcattn.cli import main

CONFIG = fa.Config(layers=2)


@pytest.fixture
def folder(tmp_path):
    fa.save(tmp_path / "m", CONFIG, fa.decoder(CONFIG).init(fa.key(0)))
    return tmp_path / "m"


def changed(folder, **fields):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **fields}))


def retensored(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def test_what_loads_is_surveyed_with_its_config(folder):
    found = survey(folder)
    assert (found.why_not, found.family, found.config) == ("", "llama", fa.load(folder).config)
    assert set(found.read) == load_file(folder / "model.safetensors").keys()
    assert found.missing == found.unknown == found.left_out == found.tokenizer == ()
    assert found.types == (("F32", len(found.read)),)


def test_quantized_records_and_what_is_ignored_are_surveyed_as_they_load(folder, tmp_path):
    config, params, _ = fa.load(folder)
    fa.save(tmp_path / "q", config, fa.quantize(fa.int8)(params))
    retensored(
        tmp_path / "q",
        lambda x: {**x, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    )
    found = survey(tmp_path / "q")
    assert (found.why_not, found.config) == ("", fa.load(tmp_path / "q").config)
    assert found.left_out == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def fields_that_are_unknown(folder):
    changed(folder, model_type="lantern")
    return "model_type in config.json should be one of"


def a_field_that_config_cannot_say(folder):
    changed(folder, sliding_window=8)
    return "sliding_window in config.json should be absent, got 8"


def tensors_that_are_missing(folder):
    retensored(folder, lambda x: {k: v for k, v in x.items() if "norm" not in k} | {"a.b": ones(1)})
    return "5 missing, 1 unknown"


def ones(n):
    return torch.ones(n)


def another_shape(folder):
    retensored(folder, lambda x: {**x, "model.norm.weight": ones(3)})
    return "1 of another shape, such as model.norm.weight"


def codes_of_another_tool(folder):
    name = "model.layers.0.self_attn.q_proj.qweight"
    retensored(folder, lambda x: {**x, name: torch.ones(2, 2, dtype=torch.int32)})
    return "those of gptq or awq"


def weights_that_are_not_there(folder):
    (folder / "model.safetensors").unlink()
    return "should hold model.safetensors"


@pytest.mark.parametrize(
    "spoil",
    [
        fields_that_are_unknown,
        a_field_that_config_cannot_say,
        tensors_that_are_missing,
        another_shape,
        codes_of_another_tool,
        weights_that_are_not_there,
    ],
)
def test_what_is_refused_is_surveyed_with_the_reason_and_does_not_load(spoil, folder, capsys):
    wanted = spoil(folder)
    found = survey(folder)
    assert wanted in found.why_not
    assert found.config is None
    with pytest.raises((ValueError, FileNotFoundError)):
        fa.load(folder)
    assert main(["inspect", "--files", "--model", str(folder)]) == 1
    assert wanted in capsys.readouterr().out


def a_tokenizer_alone(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "vocab.txt").write_text("[UNK]")
    return "a folder of a tokenizer, without a model", "vocab.txt"


def quantized():
    return fa.quantize(fa.int8, r".*\.q")(fa.decoder(CONFIG).init(fa.key(0)))


def matrices_in_codes(folder):
    fa.save(folder, CONFIG, quantized())
    return ("funcattn, 2 matrices",)


def matrices_of_another_tool(folder):
    fa.save(folder, CONFIG, quantized(), format="compressed-tensors")
    return ("compressed-tensors, 2 matrices",)


@pytest.mark.parametrize("make", [a_tokenizer_alone, matrices_in_codes, matrices_of_another_tool])
def test_a_path_without_an_option_says_what_it_holds(make, folder, capsys):
    wanted = make(folder)
    main(["inspect", "--files", str(folder)])
    told = capsys.readouterr().out
    assert all(words in told for words in wanted)


def test_a_gguf_file_is_surveyed_by_its_header(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    found = survey(path)
    assert (found.why_not, found.kind, found.family) == ("", "a .gguf file", "llama")
    assert found.config == fa.load(path).config
    other = write_gguf(tmp_path / "b.gguf", change={"general.architecture": "lantern"})
    assert "lantern" in survey(other).why_not


def test_a_file_of_another_kind_is_none(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    assert "a .bin file" in survey(tmp_path / "a.bin").why_not
