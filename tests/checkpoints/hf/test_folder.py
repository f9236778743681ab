"""The Hugging Face layout, read: weights bit for bit, or an error that tells what is wrong with the
folder.
"""

import json
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import CONFIG, params, same, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from funcattn.checkpoints import CheckpointError, load, save
from funcattn.families import leaves, write_config


@pytest.fixture
def folder(tmp_path):
    """A tied model with its tokenizer; `rewrite` changes its tensors."""
    save(tmp_path / "model", CONFIG, params(), tokenizer())
    return tmp_path / "model"


def rewrite(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def settings(folder, file="config.json", **change):
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**values, **change}))


def split(folder, places):
    """The one file in two shards and an index, with the shards' names as `places` says."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in zip(places, (names[:9], names[9:]), strict=True):
        if "/" not in file:
            save_file({name: tensors[name] for name in part}, folder / file)
    settings(
        folder,
        "model.safetensors.index.json",
        weight_map={name: places[name not in names[:9]] for name in names},
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_transformers_saved_is_read_bit_for_bit(tmp_path, tied):
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
        )
    )
    theirs.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == replace(CONFIG, tied=tied)
    assert loaded.tokenizer is None
    held = {name: weight.cpu() for name, weight in theirs.state_dict().items()}
    assert torch.equal(loaded.params.layers[1].k, held["model.layers.1.self_attn.k_proj.weight"])
    assert len(leaves(loaded.params)) == len(held) - tied
    assert tied or torch.equal(loaded.params.head, held["lm_head.weight"])


def test_shards_are_read_as_one(folder):
    split(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    assert same(load(folder).params, params())


@pytest.mark.parametrize(
    "path",
    ["../other.safetensors", "/tmp/other.safetensors", "sub/other.safetensors", "a.bin", "..", ""],
)
def test_a_shard_outside_the_folder_is_refused(folder, path):
    save_file({"a": torch.zeros(1)}, folder.parent / "other.safetensors")
    split(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    settings(folder, "model.safetensors.index.json", weight_map={**index, "extra": path})
    with pytest.raises(CheckpointError, match="beside it"):
        load(folder)


def test_a_shard_that_is_not_there_is_named(folder):
    split(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    split(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    rewrite(
        folder,
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64)}),
        "model-00001-of-00002.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(folder)


def test_every_weight_has_the_dtype_that_was_asked_for(folder):
    assert {leaf.dtype for leaf in leaves(load(folder, dtype=torch.float16).params).values()} == {
        torch.float16
    }


@pytest.mark.parametrize("kept", ["embed_tokens", "down_proj", "q_proj", "norm"])
@pytest.mark.parametrize("said", ["bfloat16", "torch.float32", "float64", None])
def test_weights_of_several_dtypes_are_brought_to_one(folder, kept, said):
    narrow = lambda name, x: x.float() if kept in name else x.bfloat16()
    rewrite(
        folder,
        lambda tensors: tensors.update({name: narrow(name, x) for name, x in tensors.items()}),
    )
    settings(folder, dtype=said)
    # what config.json says where some have it, else what holds all
    wanted = torch.bfloat16 if said == "bfloat16" else torch.float32
    loaded = load(folder).params
    assert {leaf.dtype for leaf in leaves(loaded).values()} == {wanted}
    assert same(loaded, load(folder, dtype=torch.float32).params) or wanted == torch.bfloat16
    assert {leaf.dtype for leaf in leaves(load(folder, dtype=torch.float64).params).values()} == {
        torch.float64
    }


def test_bfloat16_and_float16_are_held_by_float32(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {name: x.half() if "q_proj" in name else x.bfloat16() for name, x in tensors.items()}
        ),
    )
    assert {leaf.dtype for leaf in leaves(load(folder).params).values()} == {torch.float32}


def test_the_weights_outlive_the_file(folder):
    loaded = load(folder)
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
    assert same(loaded.params, params())


def test_tensors_that_say_nothing_new_are_left_out(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(folder, change)
    assert same(load(folder).params, params())


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
        ),
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(folder)


def test_every_difference_is_told_in_one_error(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for told in (
        "missing: model.norm.weight",
        "unknown: model.layers.0.self_attn.q_norm",
        "up_proj.weight (3, 5) instead of (96, 64)",
    ):
        assert told in str(error.value)


def test_weights_that_are_no_floats_are_refused_by_name(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* I8"):
        load(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_refused_and_not_opened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="pickle"):
        load(folder)
    with pytest.raises(CheckpointError, match="pickle"):
        load(folder / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_part_that_is_not_there_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(folder)


HEADERS = {
    "a header longer than the file": struct.pack("<Q", 2**40),
    "a header of 2^64": struct.pack("<Q", 2**64 - 1),
    "a header that is no JSON": struct.pack("<Q", 4) + b"nope",
    "offsets past the end": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "offsets that overlap": b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[1],'
    b'"data_offsets":[3,4]}}',
    "a shape larger than its bytes": b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}',
    "an unknown type": b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}',
    "nothing": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_are_refused_that_have(folder, case):
    header = HEADERS[case]
    file = struct.pack("<Q", len(header)) + header + bytes(4) if header.startswith(b"{") else header
    (folder / "model.safetensors").write_bytes(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_a_file_cut_off_anywhere_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for length in sorted({*range(200), *range(200, len(whole), 1999), len(whole) - 1}):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"a"', "[" * 10**5, "\ud800", '{"vocab_size": ' + "9" * 5000 + "}"],
    ids=lambda t: t[:9],
)
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_settings_larger_than_any_model_has_are_not_read(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**27)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointError, match=r"config\.json should be at most"):
        load(folder)


# The tokenizer's files.


@pytest.mark.parametrize(("ids", "stop"), [(7, (7,)), ([7, 9], (7, 9)), (None, (1,))])
def test_ends_are_those_of_the_generation_config_then_of_the_config(folder, ids, stop):
    settings(folder, eos_token_id=1)
    settings(folder, "generation_config.json", eos_token_id=ids)
    if ids is None:
        (folder / "generation_config.json").unlink()
    assert load(folder).tokenizer.stop == stop


@pytest.mark.parametrize("ids", ["</s>", [1, "x"], True, -1, 2**40])
def test_ends_that_are_no_ids_are_refused(folder, ids):
    settings(folder, "generation_config.json", eos_token_id=ids)
    with pytest.raises(CheckpointError, match="eos_token_id"):
        load(folder)


def test_a_template_of_its_own_file_comes_first(folder):
    (folder / "chat_template.jinja").write_text("from the file")
    assert load(folder).tokenizer.chat([]) == "from the file"


def test_a_folder_without_a_tokenizer_has_none(folder):
    (folder / "tokenizer.json").unlink()
    assert load(folder).tokenizer is None


def test_the_model_type_is_checked_before_the_weights(folder):
    (folder / "config.json").write_text(json.dumps({**write_config(CONFIG), "model_type": "rwkv"}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rwkv"):
        load(folder)
