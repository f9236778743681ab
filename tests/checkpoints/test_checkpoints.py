"""Checkpoints as a whole: both layouts hold the same model, and no file, however damaged, does more
than be refused.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from places import ROOT, TESTS
from samples import CONFIG, LLAMA3, load, params, same, write_gguf

import funcattn as fa
from funcattn import checkpoints, layers, transformer


def test_both_layouts_hold_the_same_model(tmp_path):
    gguf = fa.load(write_gguf(tmp_path / "a.gguf", kind="Q8_0"))
    fa.save(tmp_path / "b", *gguf)
    folder = fa.load(tmp_path / "b")
    assert folder.config == gguf.config == CONFIG
    assert same(folder.params, gguf.params)
    messages = [{"role": "user", "content": "hello the 12 <|end|>"}]
    assert folder.tokenizer.prompt(messages) == gguf.tokenizer.prompt(messages)
    assert (folder.tokenizer.stop, folder.tokenizer.roles) == (
        gguf.tokenizer.stop,
        gguf.tokenizer.roles,
    )


def test_weights_are_on_the_cpu_whatever_the_default_device(tmp_path):
    config, tree = replace(CONFIG, rope_base=5e5, rope_scaling=LLAMA3), params()
    # which a .gguf file holds
    factors = layers.frequencies(16, base=5e5) / layers.frequencies(16, base=5e5, scaling=LLAMA3)
    paths = (
        write_gguf(
            tmp_path / "a.gguf",
            replace(config, rope_scaling=None),
            tree,
            extra={"rope_freqs.weight": factors.cpu().numpy()},
        ),
        tmp_path / "b",
    )
    fa.save(paths[1], config, tree)
    for path in paths:
        with torch.device("meta"):
            loaded = fa.load(path)
        assert loaded.config == config
        assert same(loaded.params, tree)
        assert {leaf.device.type for leaf in fa.tree.leaves(loaded.params)} == {"cpu"}


def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path):
    config, tokens = replace(CONFIG, tied=False, rope_scaling=LLAMA3), torch.arange(20)
    model, tree = transformer.decoder(config), params(config)
    fa.save(tmp_path / "a", config, tree)
    loaded = load(tmp_path / "a")
    again = transformer.decoder(loaded.config)
    logits = again.logits(loaded.params, again.hidden(loaded.params, tokens)[0])
    assert torch.equal(logits, model.logits(tree, model.hidden(tree, tokens)[0]))


def test_every_error_of_a_file_is_one_kind_of_value_error():
    assert issubclass(fa.checkpoints.CheckpointError, ValueError)
    assert checkpoints.load is fa.load


# Mutants: see mutants.py. In a process of their own, whose memory is bounded.


def load_mutants(kind: str, first: int, count: int) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"}
    command = [sys.executable, str(TESTS / "mutants.py"), kind, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "first", "count"),
    [
        ("gguf", 0, 1000),
        ("safetensors", 0, 800),
        ("settings", 0, 800),
        ("packaged", 0, 50),
        ("parts", 0, 100),
        ("pieces", 0, 80),
        pytest.param("gguf", 1000, 31000, marks=pytest.mark.slow),
        pytest.param("safetensors", 800, 20700, marks=pytest.mark.slow),
        pytest.param("settings", 800, 20700, marks=pytest.mark.slow),
        pytest.param("packaged", 50, 1000, marks=pytest.mark.slow),
        pytest.param("parts", 100, 5000, marks=pytest.mark.slow),
        pytest.param("pieces", 80, 5070, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_file_is_loaded_or_refused_in_little_memory(kind, first, count):
    told = load_mutants(kind, first, count)
    assert told["loaded"] + told["refused"] == count
    assert told["refused"] > count // 4  # the mutations do harm
    assert kind == "packaged" or told["loaded"] > count // 20  # and not always
    # A sound file takes 1 MB (2 MB with the real metadata); the margin is for what Python and the
    # allocator keep.
    assert told["peak"] < 2**26
