"""Saving: bit for bit, readable by others, and the whole folder or nothing."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from samples import CONFIG, LLAMA3, params, same, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from funcattn import transformer
from funcattn.checkpoints import CheckpointError, load, save
from funcattn.checkpoints.hf import saving
from funcattn.core import atomic
from funcattn.families import assemble, leaves

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def cast(tree, config, dtype):
    return assemble(config, lambda path: leaves(tree)[path].to(dtype))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, dtype, tied):
    config = replace(CONFIG, tied=tied, rope_scaling=LLAMA3)
    tree = cast(params(config), config, dtype)
    save(tmp_path / "a" / "b", config, tree, tokenizer())
    loaded = load(tmp_path / "a" / "b")
    assert loaded.config == config
    assert same(loaded.params, tree)
    assert loaded.tokenizer.encode("hello") == tokenizer().encode("hello")
    assert (loaded.tokenizer.stop, loaded.tokenizer.template) == (
        tokenizer().stop,
        tokenizer().template,
    )


def test_weights_of_several_dtypes_come_back_in_the_one_that_holds_all(tmp_path):
    tree = params()._replace(norm=params().norm.bfloat16())
    save(tmp_path / "a", CONFIG, tree)
    assert same(load(tmp_path / "a").params, tree._replace(norm=tree.norm.float()))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_was_saved(tmp_path, tied):
    config = replace(CONFIG, tied=tied, rope_scaling=LLAMA3)
    save(tmp_path / "a", config, params(config), tokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "a").encode("hello the 12"))
    assert tokens.tolist() == tokenizer().encode("hello the 12")
    held = theirs.state_dict()
    assert theirs.dtype == torch.float32
    assert torch.equal(held["model.layers.1.mlp.down_proj.weight"], params(config).layers[1].down)
    model = transformer.decoder(config)
    ours = model.logits(params(config), model.hidden(params(config), tokens)[0])
    # float32 sums of at most 96 terms of order one in another order
    assert torch.allclose(ours, theirs(tokens[None]).logits[0], atol=1e-5)
    assert theirs.generation_config.eos_token_id == [0]


def test_large_models_are_spread_over_shards(tmp_path):
    save(tmp_path / "a", CONFIG, params(), shard_size=50_000)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in safe_open(tmp_path / "a" / file, "pt").keys()  # noqa: SIM118
    sizes = [path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors")]
    # the embedding alone is larger than a shard
    assert max(sizes) < 50_000 + 2_000 or max(sizes) < 300 * 64 * 4 + 2_000
    assert same(load(tmp_path / "a").params, params())
    assert same_weights_of_transformers(tmp_path / "a")


def same_weights_of_transformers(folder):
    return torch.equal(
        AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.norm.weight"],
        params().norm,
    )


def test_weights_that_are_views_of_one_memory_are_saved(tmp_path):
    tree = params()
    k, v = torch.stack([tree.layers[0].k, tree.layers[0].v]).unbind()
    tree = tree._replace(
        layers=(
            tree.layers[0]._replace(k=k, v=v, o=tree.layers[0].o.T.contiguous().T),
            tree.layers[1],
        )
    )
    save(tmp_path / "a", CONFIG, tree)
    assert same(load(tmp_path / "a").params, params())


def test_saving_over_a_saved_model_replaces_all_of_it(tmp_path):
    save(tmp_path / "a", CONFIG, params(), tokenizer(), shard_size=50_000)
    save(tmp_path / "a", CONFIG, params(seed=1))
    assert sorted(content(tmp_path / "a")) == ["config.json", "model.safetensors"]
    assert same(load(tmp_path / "a").params, params(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path):
    save(tmp_path / "real", CONFIG, params())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", CONFIG, params(seed=1))
    assert (tmp_path / "link").is_symlink()
    assert same(load(tmp_path / "real").params, params(seed=1))


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save(tmp_path, CONFIG, params())
    assert content(tmp_path) == {"notes.txt": b"mine"}


FAILURES = {
    "the disk is full": ("save_file", OSError(28, "No space left on device")),
    "safetensors fails": ("save_file", RuntimeError("no")),
    "the user stops it": ("save_file", KeyboardInterrupt()),
    "the disk does not take it": ("_flush", OSError(5, "Input/output error")),
    "safetensors finds the disk full": (
        "save_file",
        SafetensorError("I/O error: File too large (os error 27)"),
    ),
}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("case", FAILURES)
def test_what_was_there_is_untouched_where(tmp_path, monkeypatch, case, existing):
    if existing:
        save(tmp_path / "a", CONFIG, params(), tokenizer())
    before = content(tmp_path / "a") if existing else None
    name, error = FAILURES[case]

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(atomic if name == "_flush" else saving, name, fails)
    wanted = CheckpointError if isinstance(error, (OSError, SafetensorError)) else type(error)
    with pytest.raises(wanted):
        save(tmp_path / "a", CONFIG, params(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if existing else [])
    assert before is None or content(tmp_path / "a") == before


@pytest.mark.parametrize("turn", [1, 2])
def test_what_was_there_is_back_where_a_rename_fails(tmp_path, monkeypatch, turn):
    save(tmp_path / "a", CONFIG, params(), tokenizer())
    before, turns, rename = content(tmp_path / "a"), [], os.rename

    def fails(self, target):
        turns.append(target)
        if len(turns) == turn:
            raise OSError(16, "Device or resource busy")
        rename(self, target)

    monkeypatch.setattr(atomic, "exchange", lambda a, b: False)  # as on a system without one
    monkeypatch.setattr("pathlib.Path.rename", fails)
    with pytest.raises(CheckpointError, match="busy"):
        save(tmp_path / "a", CONFIG, params(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert content(tmp_path / "a") == before


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="Choose another place"):
        save(tmp_path / "file", CONFIG, params())
    with pytest.raises(CheckpointError, match="can be written"):
        save(tmp_path / "file" / "below", CONFIG, params())
    assert content(tmp_path) == {"file": b"mine"}
    with pytest.raises(CheckpointError, match="can be written"):
        save("/proc/nowhere", CONFIG, params())


def test_params_that_are_not_those_of_the_config_are_refused(tmp_path):
    tree = params()
    cases = [
        (tree._replace(norm=torch.zeros(3)), ValueError, "norm should be .*64.* got .*3"),
        (
            CONFIG,
            TypeError,
            "save: config, params should be a Config and its Params, got a Config and a Config. "
            "The order is folder,",
        ),
        (tree._replace(layers=tree.layers[:1]), ValueError, r"layers\.1\.attention_norm"),
        (tree._replace(head=tree.embedding), ValueError, "head"),
        (
            tree._replace(norm=tree.norm.long()),
            TypeError,
            "norm should be of a dtype among .*, got torch.int64",
        ),
        (tree._replace(norm=(tree.norm, tree.norm)), TypeError, "Dequantize"),
    ]
    for wrong, kind, told in cases:
        with pytest.raises(kind, match=told):
            save(tmp_path / "a", CONFIG, wrong)
    assert list(tmp_path.iterdir()) == []
