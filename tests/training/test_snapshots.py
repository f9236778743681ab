"""Snapshots whose checksums fit and whose content does not: each is refused, with what to
remove.
"""

import hashlib
import json
import os
import shutil

import pytest
import torch
from fitted import begin

from funcattn.checkpoints import CheckpointError
from funcattn.training import snapshots

LEAF = "params.embedding"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    begin(folder, steps=4)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def refusal(folder, change):
    """What is said of the newest snapshot after a change of its record, whose checksum fits."""
    place = sorted(folder.glob("step-*"))[-1]
    good = (place / "run.json").read_text()
    record = json.loads(good)
    record = change(record) or record
    if "content" in record:
        record["sha256"] = hashlib.sha256(
            json.dumps(record["content"], sort_keys=True).encode()
        ).hexdigest()
    (place / "run.json").write_text(json.dumps(record))
    try:
        with pytest.raises(CheckpointError) as error:
            begin(folder, steps=5, resume=True)
        return str(error.value)
    finally:
        (place / "run.json").write_text(good)


ODD = [None, True, 3, 2.5, "x", [], [1], {}, {"a": 1}]


def at(*path):
    def change(value):
        def put(record):
            for name in path[:-1]:
                record = record[name]
            record[path[-1]] = value

        return put

    return change


@pytest.mark.parametrize(
    "path",
    [
        ("content",),
        ("content", "step"),
        ("content", "run"),
        ("content", "tensors"),
        ("content", "run", "of"),
        ("content", "run", "told"),
    ],
    ids=lambda path: path[-1],
)
def test_a_part_of_another_kind_is_refused(folder, path):
    for value in ODD:
        if (path[-1], value) != ("told", []):
            assert "Remove" in refusal(folder, at(*path)(value)), value


@pytest.mark.parametrize(
    "value", [None, True, 3, "x", [1], {"a": 1}, {LEAF: None}, {"no leaf": [1, 1]}], ids=str
)
def test_strides_of_another_kind_are_refused(folder, value):
    assert "strides" in refusal(folder, at("content", "strides")(value))


@pytest.mark.parametrize(
    "reports",
    [
        [[1]],
        [[1, 2.0]],
        [["a", 1.0, None]],
        [[1, "a", None]],
        [[True, 1.0, None]],
        [[1, None, 1.0]],
        "abc",
    ],
)
def test_reports_of_another_kind_are_refused(folder, reports):
    assert "reports" in refusal(folder, at("content", "run", "told")(reports))


@pytest.mark.parametrize("losses", [["x"], [None], [True], [[1.0]], {"0": 1.0}, "12"])
def test_losses_of_another_kind_are_refused(folder, losses):
    assert "losses" in refusal(folder, at("content", "run", "seen")(losses))


@pytest.mark.parametrize("name", ["step", "strides", "run", "tensors"])
def test_a_content_that_lacks_a_part_or_has_another_is_refused(folder, name):
    assert "another release" in refusal(folder, lambda record: record["content"].pop(name) and None)
    assert "another release" in refusal(folder, at("content", "more")(1))


def test_a_run_that_lacks_a_part_or_has_another_is_refused(folder):
    assert "another release" in refusal(
        folder, lambda record: record["content"]["run"]["of"].pop("key") and None
    )
    assert "another release" in refusal(folder, at("content", "run", "of", "more")(1))


STRIDES = [
    [-1, 1],
    [1],
    "ab",
    [10**12, 1],
    [100_000, 1],
    [1, 1],
    [0, 1],
    [8.0, 1],
    [True, 1],
    [2**63, 1],
    [1, 2, 3],
    [24, 3],
]


@pytest.mark.parametrize("strides", STRIDES, ids=str)
def test_strides_that_are_no_order_of_the_numbers_are_refused(folder, strides):
    # of (13, 8)
    assert f"strides of {LEAF}" in refusal(folder, at("content", "strides")({LEAF: strides}))


@pytest.mark.parametrize("strides", [[8, 1], [1, 13], [9, 1]], ids=str)
def test_the_order_in_memory_is_kept(tmp_path, strides):
    stored = torch.empty_strided((13, 8), strides).copy_(torch.arange(104.0).reshape(13, 8))
    snapshots.write(tmp_path, 1, {"x": stored}, {})
    found = snapshots.read(tmp_path, 1, {"x": stored})[0]["x"]
    assert torch.equal(found, stored)
    assert list(found.stride()) == strides


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"content":' * 10**5, "\udcff", "{" + '"a": "' + "x" * 2**26 + '"}'],
    ids=["", "[]", "{", "bytes", "large"],
)
def test_a_record_that_is_no_object_is_refused(folder, text):
    place = sorted(folder.glob("step-*"))[-1]
    (place / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="Remove"):
        begin(folder, steps=5, resume=True)


@pytest.mark.parametrize("name", ["run.json", "tensors.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused(folder, name):
    place = sorted(folder.glob("step-*"))[-1]
    (place / name).unlink()
    os.mkfifo(place / name)
    with pytest.raises(CheckpointError, match="Remove"):
        begin(folder, steps=5, resume=True)


def test_tensors_that_are_no_safetensors_are_refused(folder):
    place = sorted(folder.glob("step-*"))[-1]
    (place / "tensors.safetensors").write_bytes(b"nonsense")
    digest = hashlib.sha256(b"nonsense").hexdigest()
    assert "tensors.safetensors that is none" in refusal(folder, at("content", "tensors")(digest))
