"""The index of a torch.distributed.checkpoint folder: file and block of each tensor.

torch writes it as a pickle, which can run any code. It is read here by an unpickler restricted to
the classes of an index. An entry that is not a tensor is an error (torch unpickles those in full),
and so is a file outside of the folder.
"""

import io
import itertools
import math
import pickle
import types
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..core.errors import fail
from .families import CheckpointError
from .families.tables import Json
from .regular_files import LARGE, check_regular, read_bytes

NAME = ".metadata"  # torch's
MOST_BLOCKS = 1024  # of one tensor, which are compared in pairs: as many as there were processes
METADATA = "torch.distributed.checkpoint.metadata"
CLASSES: dict[tuple[str, str], object] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name],
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        (METADATA, kind.__name__): kind
        for kind in (
            *(ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta),
            *(TensorProperties, TensorStorageMetadata, _MEM_FORMAT_ENCODING),
        )
    },
    # The path of the writer, possibly of another operating system, is ignored.
    **{
        ("pathlib", f"{kind}Path"): lambda *parts: "/".join(map(str, parts))
        for kind in ("Posix", "Windows")
    },
    **{
        ("pathlib._local", f"{kind}Path"): lambda *parts: "/".join(map(str, parts))
        for kind in ("Posix", "Windows")
    },
}


_InPython: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _Unpickler(_InPython):
    """In Python, so that a state can be refused: it would set attributes of a class, for the whole
    process.
    """

    dispatch: ClassVar[dict[int, Any]] = {**_InPython.dispatch}

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type | types.FunctionType):
            raise pickle.UnpicklingError("a state for a class, which no index holds")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}, which no index holds")


class Reader(FileSystemReader):
    """torch's reader of a folder, with a validated index.

    Raises:
        CheckpointError: the index is damaged, or has other values than an index of tensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = read_index(folder)

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """The index, with the id of this load, which torch sets."""
        if self.index.storage_meta is not None:
            self.index.storage_meta.load_id = self.load_id
        return self.index


def read_index(folder: Path) -> Metadata:
    """The validated index of a folder."""
    data = read_bytes(folder / NAME, LARGE, "load_parts")
    try:
        index = _Unpickler(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:  # any error of the unpickler or of a constructor
        _refuse(
            folder,
            "an index of torch.distributed.checkpoint",
            f"{type(error).__name__}: {str(error)[:200]}",
        )
    tensors = getattr(index, "state_dict_metadata", None) if type(index) is Metadata else None
    files = index.storage_data if tensors is not None else None
    if not isinstance(tensors, dict) or not isinstance(files, dict):
        _refuse(folder, "an index of torch.distributed.checkpoint", f"a {type(index).__name__}")
    for name, entry in tensors.items():
        if type(entry) is not TensorStorageMetadata:
            _refuse(folder, "one of tensors", f"a {type(entry).__name__} for {name}")
        if not _is_covered(entry) or any(
            MetadataIndex(name, block.offsets) not in files for block in entry.chunks
        ):
            _refuse(folder, "blocks that make up each tensor", f"others for {name}")
    for block in files.values():
        name = block.relative_path if type(block) is _StorageInfo else None
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or "\\" in name
            or not name.endswith(".distcp")
        ):
            _refuse(folder, "one of .distcp files beside it", repr(name))
        if block.transform_descriptors:
            _refuse(folder, "one of plain files", f"{name} after {block.transform_descriptors}")
    for name in {block.relative_path for block in files.values()}:
        check_regular(folder / name, "load_parts")
    return index


def _is_covered(entry: TensorStorageMetadata) -> bool:
    """True where the blocks of a tensor lie in it, do not overlap, and together have its size."""
    size, blocks = entry.size, entry.chunks
    if not _are_counts(size) or not isinstance(blocks, list) or len(blocks) > MOST_BLOCKS:
        return False
    for block in blocks:
        if (
            type(block) is not ChunkStorageMetadata
            or not _are_counts(block.offsets)
            or not _are_counts(block.sizes)
        ):
            return False
        if not len(block.offsets) == len(block.sizes) == len(size):
            return False
        if any(
            begin + n > whole
            for begin, n, whole in zip(block.offsets, block.sizes, size, strict=True)
        ):
            return False
    apart = lambda a, b: any(
        x + n <= y or y + m <= x
        for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
    full = [block for block in blocks if math.prod(block.sizes)]
    covered = sum(math.prod(block.sizes) for block in full) == math.prod(size)
    return covered and all(itertools.starmap(apart, itertools.combinations(full, 2)))


def _are_counts(sizes: Json) -> bool:
    return isinstance(sizes, tuple | list) and all(type(n) is int and n >= 0 for n in sizes)


def _refuse(folder: Path, wanted: str, got: str) -> NoReturn:
    fail(
        "load_parts",
        f"the index of {folder}",
        wanted,
        got,
        "Give a folder that save_parts wrote.",
        CheckpointError,
    )
