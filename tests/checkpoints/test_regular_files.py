"""What stands in the place of a file: a pipe, a device, a folder, or one too large. Each door says
so, and none waits for it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from samples import CONFIG, params, tokenizer, write_gguf

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.hf import adapters, folder
from funcattn.checkpoints.regular_files import read_json, read_text

PARTS = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
]
PARTS += ["chat_template.jinja", "model.safetensors.index.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    fa.save(place / "model", CONFIG, params(), tokenizer())
    fa.save_lora(place / "adapter", fa.lora(2)(fa.key(1), params()))
    return place


def socket_at(path):
    # a whole path may be too long for its address
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
        made.bind(path.name)


KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "socket": socket_at,
}


def outcome(load):
    """What came of a call within five seconds; a reader that waits for a pipe would wait for
    ever.
    """
    found = []

    def run():
        try:
            found.append(load())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits"
    return found[0]


def replaced(folder, name, kind):
    if (folder / name).exists():
        (folder / name).unlink()
    if name.startswith("model.safetensors.index"):
        (folder / "model.safetensors").unlink()
    KINDS[kind](folder / name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_model_that_is_no_regular_file_is_refused(saved, tmp_path, name, kind):
    folder = shutil.copytree(saved / "model", tmp_path / "m")
    replaced(folder, name, kind)
    error = outcome(lambda: fa.load(folder))
    assert isinstance(error, CheckpointError)
    assert f"{name} should be a regular file, got a {kind}" in str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_part_of_an_adapter_that_is_no_regular_file_is_refused(saved, tmp_path, name, kind):
    folder = shutil.copytree(saved / "adapter", tmp_path / "a")
    replaced(folder, name, kind)
    error = outcome(lambda: fa.load_lora(folder, params()))
    assert isinstance(error, CheckpointError)
    assert f"{name} should be a regular file, got a {kind}" in str(error)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_named_as_a_gguf_file_and_is_none_is_refused(tmp_path, kind):
    KINDS[kind](tmp_path / "x.gguf")
    error = outcome(lambda: fa.load(tmp_path / "x.gguf"))
    assert isinstance(error, CheckpointError)
    assert f"should be a regular file, got a {kind}" in str(error)


def test_a_shard_that_is_a_pipe_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved / "model", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "got a pipe" in str(outcome(lambda: fa.load(folder)))


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_settings_larger_than_any_are_not_read(saved, tmp_path, name):
    folder = shutil.copytree(saved / "model", tmp_path / "m")
    with open(folder / name, "ab") as file:
        file.truncate(2**33)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointError, match=f"{name} should be at most 4194304 bytes"):
        fa.load(folder)


def test_a_file_whose_size_is_not_told_is_read_up_to_its_limit():
    status = Path("/proc/self/status")  # 0 bytes, says the system
    assert read_text(status).startswith("Name:")
    with pytest.raises(CheckpointError, match="at most 3 bytes, got more"):
        read_text(status, 3)


def test_a_link_to_nothing_is_not_a_part_left_out(saved, tmp_path):
    folder = shutil.copytree(saved / "model", tmp_path / "m")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="generation_config"):
        fa.load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"a":' * 10**5, '{"a": ' + "9" * 5000 + "}", "\xff"],
    ids=lambda t: t[:9],
)
def test_what_is_no_object_in_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"load: x\.json should be"):
        read_json(tmp_path / "x.json")


def test_a_gguf_file_that_is_a_hole_is_refused_at_once(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", change={"x": ["a"] * 3})
    data = path.read_bytes()
    # where the count of strings is; behind it empty strings for ever
    at = data.index(b"x\x09\0\0\0\x08\0\0\0") + 9
    path.write_bytes(data[:at] + (2**33).to_bytes(8, "little"))
    with open(path, "r+b") as file:
        file.truncate(2**37)
    with pytest.raises(CheckpointError, match=r"should be at most .* strings"):
        fa.load(path)


def test_what_is_saved_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    old, new = (
        fa.lora(2, alpha=alpha)(fa.key(seed), params()) for seed, alpha in ((1, 4.0), (2, 400.0))
    )
    fa.save_lora(tmp_path / "adapter", old)
    fa.save(tmp_path / "model", CONFIG, params())

    def saving(read, save):
        """read, of which the first call finds another save made behind it."""
        saves = iter([save])
        return lambda *arguments: (read(*arguments), [save() for save in saves])[0]

    monkeypatch.setattr(
        adapters,
        "read_settings",
        saving(adapters.read_settings, lambda: fa.save_lora(tmp_path / "adapter", new)),
    )
    found = fa.load_lora(tmp_path / "adapter", params())
    assert all(
        torch.equal(x, y) for x, y in zip(fa.tree.leaves(found), fa.tree.leaves(new), strict=True)
    )

    deeper = dataclasses.replace(CONFIG, layers=CONFIG.layers + 1)
    again = lambda: fa.save(tmp_path / "model", deeper, fa.decoder(deeper).init(fa.key(0)))
    monkeypatch.setattr(folder.families, "read_config", saving(folder.families.read_config, again))
    assert fa.load(tmp_path / "model").config == deeper
