"""GGUF: one file that holds metadata (the tokenizer too) and tensors, most of them quantized in
blocks, whose arithmetic is that of the `gguf` package.
"""

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from ... import tree
from ...core.errors import fail
from ...layers import Weight
from ...transformer import Config, Params
from .. import families
from ..families import CheckpointError
from ..families.tables import Json
from ..hf import compressed
from ..regular_files import open_regular
from .header import Entry, read_header


def read_tensor(data: mmap.mmap | bytes, entry: Entry) -> Tensor:
    """One tensor in float32, by `gguf.quants.dequantize`, in new memory."""
    stored = np.frombuffer(data, np.uint8, entry.size, entry.start).reshape(*entry.shape[:-1], -1)
    with np.errstate(all="ignore"):  # a damaged scale may be infinite, and then the weight is
        numbers = quants.dequantize(stored, GGMLQuantizationType[entry.type])
    return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())


def _is_whole(parts: Json) -> bool:
    """True where a file is not one of several parts."""
    return type(parts) is int and parts in (0, 1)


def read_gguf(
    path: Path, dtype: torch.dtype | None = None, *, keep_quantized: bool = False
) -> tuple[Config, Params, dict[str, Json]]:
    """Config, weights (dequantized or as records, q and k half-split) and metadata of a GGUF
    file.
    """
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            fail("load", str(path), "a model", "an empty file", "Fetch it again.", CheckpointError)
        # unmapped with the last reference
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata, tensors = read_header(data, path.name)
    if not _is_whole(metadata.get("split.count", 0)):
        remedy = "Join the parts with gguf-split --merge."
        fail(
            "load", str(path), "a whole model", "one part of a split file", remedy, CheckpointError
        )
    names = families.GGUF_TENSORS
    stretch = (
        read_tensor(data, tensors.pop(families.STRETCH)) if families.STRETCH in tensors else None
    )
    # missing tensors are reported together
    vocabulary = tensors[names["embedding"]].shape[0] if names["embedding"] in tensors else 1
    config = families.read_metadata(metadata, vocabulary, names["head"] not in tensors, stretch)
    family = families.GGUF[metadata["general.architecture"]]
    spelled = {path: families.spelling(names, path) for path in families.shapes(config)}
    found = {name: entry.shape for name, entry in tensors.items()}
    families.match(
        {spelled[path]: shape for path, shape in families.shapes(config).items()}, found, path.name
    )

    def leaf(path: str) -> Weight:
        entry, kind = tensors[spelled[path]], path.rpartition(".")[2]
        if keep_quantized and entry.type in compressed.BLOCKS and len(entry.shape) == 2:
            record = compressed.from_blocks(data, entry.start, *entry.shape, entry.type)
            if kind not in family.rotated:
                return record
            return tree.map(lambda field: families.half_split(field, config.head_size), record)
        weight = read_tensor(data, entry)
        if kind in family.rotated:
            weight = families.half_split(weight, config.head_size)
        if family.offset and kind.endswith("norm"):
            weight = weight - family.offset
        return weight.to(dtype or torch.float32)

    return config, families.assemble(config, leaf), metadata
