"""GGUF: one file that holds metadata (the tokenizer too) and tensors, most of them quantized in
blocks, whose arithmetic is that of the `gguf` package.
"""

import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from ... import tree
from ...core.errors import fail, printable
from ...layers import Weight
from ...quantization import is_quantized
from ...transformer import Config, Params
from .. import families
from ..families import CheckpointError
from ..families.tables import Json
from ..freed_memory import Reading, give_back
from ..regular_files import open_regular
from . import blocks
from .header import Entry, read_header

PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
MOST_PARTS = 2**9  # each is an open file
REMEDY = "Fetch the parts again, all of one model."
# leaves that quantized products read
MULTIPLIED = ("embedding", "head", "q", "k", "v", "o", "gate", "up", "down")
MULTIPLIED += ("q_down", "kv_down", "shared_gate", "shared_up", "shared_down")


class Stored(NamedTuple):
    """A tensor of a file: the bytes of the file, and where in them it is."""

    data: mmap.mmap
    entry: Entry


def read_tensor(data: mmap.mmap | bytes, entry: Entry) -> Tensor:
    """One tensor in float32, by `gguf.quants.dequantize`, in new memory."""
    stored = np.frombuffer(data, np.uint8, entry.size, entry.start).reshape(*entry.shape[:-1], -1)
    with np.errstate(all="ignore"):  # a damaged scale may be infinite, and then the weight is
        numbers = quants.dequantize(stored, GGMLQuantizationType[entry.type])
    return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())


def read_parts(path: Path) -> tuple[dict[str, Json], dict[str, Stored]]:
    """The metadata and the tensors of a GGUF model: of one file, or of all parts by the name of the
    first, `...-00001-of-00003.gguf`.
    """
    metadata, found = _read_file(path)
    count = metadata.get("split.count", 0)
    if type(count) is int and count in (0, 1):
        return metadata, found
    named = PART.fullmatch(path.name)
    if (
        named is None
        or type(count) is not int
        or not 1 < count <= MOST_PARTS
        or not _is(metadata.get("split.no"), 0)
        or named.groups()[1:] != ("00001", f"{count:05}")
    ):
        wanted = "the first part of a split file, named ...-00001-of-" + "N" * 5 + ".gguf"
        got = f"part {metadata.get('split.no')} (counted from 0) of {count}"
        remedy = "Keep the names of gguf-split and load the first, or join with gguf-split --merge."
        fail("load", str(path), wanted, got, remedy, CheckpointError)
    for number in range(1, count):
        part = path.with_name(f"{named[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not os.path.lexists(part):
            told = f"load: {part} should be beside {path.name}, whose part it is. Fetch it too."
            raise FileNotFoundError(printable(told))
        header, tensors = _read_file(part)
        said = header.get("split.no"), header.get("split.count")
        if not all(map(_is, said, (number, count))) or tensors.keys() & found.keys():
            wanted = f"part {number} of {count}, of tensors that no other has"
            got = f"part {said[0]} of {said[1]}, of {len(tensors.keys() & found.keys())} others'"
            fail("load", str(part), wanted, got, REMEDY, CheckpointError)
        found |= tensors
    total = metadata.get("split.tensors.count", len(found))
    if not _is(total, len(found)):
        fail("load", f"tensors of {path}", f"{total} in all", len(found), REMEDY, CheckpointError)
    return metadata, found


def _is(value: Json, number: int) -> bool:
    """True for this number, and not for a bool or an array."""
    return type(value) is int and value == number


def _read_file(path: Path) -> tuple[dict[str, Json], dict[str, Stored]]:
    """Metadata and tensors of one file."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            fail("load", str(path), "a model", "an empty file", "Fetch it again.", CheckpointError)
        # unmapped with the last reference
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata, tensors = read_header(data, path.name)
    return metadata, {name: Stored(data, entry) for name, entry in tensors.items()}


def read_layout(
    path: Path, metadata: dict[str, Json], stored: dict[str, Stored]
) -> tuple[Config, list[families.Source]]:
    """The Config of a GGUF model and where its leaves are; factors of angles are taken out of
    `stored`.

    Raises:
        CheckpointError: a field that Config cannot say, or tensors that are not those of it.
    """
    names = families.GGUF_TENSORS
    take = lambda name: read_tensor(*stored.pop(name)) if name in stored else None
    stretch, short, long = map(take, (families.STRETCH, families.SHORT, families.LONG))
    # missing tensors are reported together
    vocabulary = stored[names["embedding"]].entry.shape[0] if names["embedding"] in stored else 1
    config = families.read_metadata(
        metadata,
        vocabulary,
        names["head"] not in stored,
        stretch,
        factors=None if short is None or long is None else (short, long),
        tensors=stored.keys(),
    )
    family = families.GGUF[metadata["general.architecture"]]
    sources = families.locate_tensors(family.spelling(stored.keys()), config)
    unused = family.unused(config)
    shapes = {name: entry.shape for name, (_, entry) in stored.items() if name not in unused}
    families.match(families.wanted(config, sources), shapes, path.name)
    return config, sources


def read_gguf(
    path: Path, dtype: torch.dtype | None = None, *, keep_quantized: bool = False
) -> tuple[Config, Params, dict[str, Json]]:
    """Config, weights (dequantized or as records, q and k half-split) and metadata of a GGUF
    model.
    """
    metadata, stored = read_parts(path)
    config, sources = read_layout(path, metadata, stored)
    family = families.GGUF[metadata["general.architecture"]]
    reading = Reading()

    def read(name: str, kind: str) -> Weight:
        data, entry = stored[name]
        reading.count(entry.size, data)
        is_block = entry.type in blocks.KEPT and len(entry.shape) == 2
        if keep_quantized and is_block and kind in MULTIPLIED:
            rows, columns = entry.shape
            return blocks.from_blocks(data, entry.start, rows, columns, entry.type)
        return read_tensor(data, entry)

    def finish(weight: Weight, kind: str) -> Weight:
        if kind in family.rotated:
            weight = _by_fields(lambda x: _half_split(x, kind, config), weight)
        if is_quantized(weight):
            return weight
        if family.offset and kind.endswith("norm"):
            weight = weight - family.offset
        # Rounded, the bias would choose other experts than the original, which keeps it in float32.
        floats = weight.to(torch.float32 if kind == "choice_bias" else dtype or torch.float32)
        return families.by_columns(floats)

    found = {}
    for source in sources:
        kinds = [path.rpartition(".")[2] for path in source.paths]
        # the packs of GGUF files are of one tensor each, whose rows they part
        (tensor,) = (read(name, kinds[0]) for name in source.names)
        leaves = [
            _by_fields(lambda x, i=i, pack=source.pack: pack.unpack(config, [x])[i], tensor)
            for i in range(len(kinds))
        ]
        found |= {
            path: finish(leaf, kind)
            for path, kind, leaf in zip(source.paths, kinds, leaves, strict=True)
        }
    give_back()
    return config, families.assemble(config, found.__getitem__), metadata


def _by_fields(f: Callable[[Tensor], Tensor], weight: Weight) -> Weight:
    """f of the rows of a weight, which are also those of each field of a record."""
    return tree.map(f, weight) if is_quantized(weight) else f(weight)


def _half_split(weight: Tensor, kind: str, config: Config) -> Tensor:
    rows = weight.flatten() if kind.endswith("norm") else weight
    return families.half_split(rows, config.head_size, config.rotary_size).reshape(weight.shape)
