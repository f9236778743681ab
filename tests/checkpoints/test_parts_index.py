"""The index of a folder of parts: read without running code, and refused where it is no index of
tensors.
"""

import builtins
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

import funcattn as fa
from funcattn.checkpoints import CheckpointError, load_parts, save_parts

TREE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": {"c": torch.ones(4, dtype=torch.bfloat16), "d": torch.arange(3)},
}


class Code:
    def __reduce__(self):
        return exec, ("import builtins; builtins.ran = True",)


@pytest.fixture
def folder(tmp_path):
    save_parts(tmp_path / "saved", TREE)
    return tmp_path / "saved"


def changed(folder, change):
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(index) or index))


def test_what_was_saved_is_read(folder):
    like = fa.tree.map(torch.zeros_like, TREE)
    found = load_parts(folder, like)
    assert all(
        torch.equal(a, b) for a, b in zip(fa.tree.leaves(found), fa.tree.leaves(TREE), strict=True)
    )


def first(index):
    return next(iter(index.storage_data.values()))


def chunks(index):
    return index.state_dict_metadata["a"].chunks


def halved(index, offset):
    """Two blocks of a row, the second at that row: the first again, or one that no file has."""
    block = chunks(index)[0]
    block.sizes = torch.Size([1, 3])
    chunks(index).append(type(block)(torch.Size([offset, 0]), block.sizes))


HARMS = {
    "code": lambda index: Code(),
    "code inside": lambda index: setattr(index, "planner_data", Code()),
    "a module's function": lambda index: setattr(index, "planner_data", torch.load),
    "no tensor": lambda index: index.state_dict_metadata.update(a=BytesStorageMetadata()),
    "a file outside": lambda index: setattr(first(index), "relative_path", "../saved/__0_0.distcp"),
    "another file": lambda index: setattr(first(index), "relative_path", "x.bin"),
    "a transformed file": lambda index: setattr(first(index), "transform_descriptors", ["zstd"]),
    "no table": lambda index: setattr(index, "storage_data", None),
    "a list": lambda index: [index],
    "no blocks": lambda index: chunks(index).clear(),
    "a smaller block": lambda index: setattr(chunks(index)[0], "sizes", torch.Size([1, 3])),
    "a block beyond": lambda index: setattr(chunks(index)[0], "offsets", torch.Size([1, 0])),
    "one block twice, one missing": lambda index: halved(index, 0),
    "a block without a file": lambda index: halved(index, 1),
    "a size below 0": lambda index: setattr(index.state_dict_metadata["a"], "size", (-2, -3)),
}


@pytest.mark.parametrize("harm", HARMS)
def test_an_index_of_anything_else_is_refused_and_runs_nothing(folder, harm):
    changed(folder, HARMS[harm])
    with pytest.raises(CheckpointError, match="load_parts: the index of"):
        load_parts(folder, TREE)
    assert not hasattr(builtins, "ran")


@pytest.mark.parametrize("size", [0, 1, 40, 200])
def test_a_damaged_index_is_refused(folder, size):
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="load_parts: the index of"):
        load_parts(folder, TREE)


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").mkdir()
    with pytest.raises(CheckpointError, match="should be a regular file"):
        load_parts(folder, TREE)


def test_a_state_for_a_class_changes_no_class(folder):
    name = b"torch.distributed.checkpoint.metadata"
    state = b"N}\x8c\x08__init__ctorch\nSize\ns\x86b0}."
    (folder / ".metadata").write_bytes(b"\x80\x04c" + name + b"\nChunkStorageMetadata\n" + state)
    with pytest.raises(CheckpointError, match="a state for a class"):
        load_parts(folder, TREE)
    assert ChunkStorageMetadata.__init__ is not torch.Size
