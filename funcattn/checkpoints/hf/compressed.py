"""Quantized weights in files: records in safetensors, and GGUF blocks as records, bit for bit.

In a folder the fields of a record replace the matrix, `...q_proj.codes` and `...q_proj.scale` for
`...q_proj.weight`. `quantization_config` of config.json has the type of each record and the family;
`model_type` is "funcattn", so that other readers reject the folder. They would ignore an unknown
quantization method, and run with random matrices. Leaves that a family stores joined, split or
transposed are written one by one where one of them is a record: `funcattn.layers.0.k.codes`.

    Q4_0    w = (code - 8) d           Int4 of groups of 32, zero -8 d
    Q4_1    w = code d + m             Int4 of groups of 32
    Q8_0    w = code d                 Int8 of groups of 32
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ... import quantization
from ...core.errors import fail
from ...layers import Weight
from ..families import PLAIN, CheckpointError, Source
from ..families.tables import Json

METHOD = "funcattn"
KINDS = {kind.__name__: kind for kind in quantization.RECORDS}
CODES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FIELDS = {*CODES, "I32"}  # types of what is in a record: an order is of integers
BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # type -> bytes of a block of 32 numbers
SIZE = 32
REMEDY = "The file is damaged, or was written by another version: fetch it again."


# Records in a folder.


def fields(name: str, kind: str) -> dict[str, str]:
    """Field -> name on disk, for the record that replaces the matrix `name`.

    Example:
        >>> fields("layers.0.q_proj.weight", "Int8")
        {'codes': 'layers.0.q_proj.codes', 'scale': 'layers.0.q_proj.scale'}
    """
    return {field: f"{name.removesuffix('.weight')}.{field}" for field in KINDS[kind]._fields}


def leaf_name(path: str) -> str:
    """The name on disk of a leaf that is written by itself, in place of its family's tensors."""
    return f"{METHOD}.{path}"


def by_leaves(sources: Sequence[Source], kinds: Mapping[str, str]) -> list[Source]:
    """Sources, of which those that were written leaf by leaf are read so.

    Args:
        kinds: name -> type of the records of the file.
    """
    is_apart = lambda source: any(leaf_name(path) in kinds for path in source.paths)
    one = lambda path: Source((path,), (leaf_name(path),), PLAIN)
    each = [map(one, source.paths) if is_apart(source) else [source] for source in sources]
    return [source for found in each for source in found]


def flatten_records(tensors: Mapping[str, Weight]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, with records split into fields; and name -> type of the records."""
    flat: dict[str, Tensor] = {}
    kinds = {
        name: type(leaf).__name__ for name, leaf in tensors.items() if not isinstance(leaf, Tensor)
    }
    for name, leaf in tensors.items():
        if name in kinds:
            flat |= {
                stored: getattr(leaf, field) for field, stored in fields(name, kinds[name]).items()
            }
        else:
            flat[name] = leaf
    return flat, kinds


def settings(values: Mapping[str, object], kinds: Mapping[str, str]) -> dict[str, Json]:
    """The values of config.json, with the types of records if there are any."""
    if not kinds:
        return dict(values)
    said = {"quant_method": METHOD, "model_type": values["model_type"], "records": dict(kinds)}
    return {**values, "model_type": METHOD, "quantization_config": said}


def kinds_in(values: dict[str, Json]) -> dict[str, str]:
    """Name -> type of records; restores the family's fields in values.

    The quantization_config of another method is kept, and is an error later.
    """
    said = values.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return {}
    del values["quantization_config"]
    values["model_type"] = said.get("model_type")
    kinds = said.get("records")
    if not isinstance(kinds, dict) or not all(kind in KINDS for kind in map(str, kinds.values())):
        fail(
            "load",
            "records in config.json",
            f"names with one of {', '.join(KINDS)}",
            str(kinds)[:200],
            REMEDY,
            CheckpointError,
        )
    return {str(name): str(kind) for name, kind in kinds.items()}


def read_record(name: str, kind: str, read: Callable[[str], Tensor]) -> Weight:
    """The record that replaces the matrix `name`."""
    record = KINDS[kind](**{field: read(stored) for field, stored in fields(name, kind).items()})
    try:
        expanded = quantization.expand(type(record)(*(x.to("meta") for x in record)))
    except (RuntimeError, IndexError) as error:
        fail(
            "load",
            name,
            f"the fields of one {kind}",
            f"others: {str(error)[:100]}",
            REMEDY,
            CheckpointError,
        )
    if record.codes.dtype not in CODES.values() or tuple(expanded.shape) != record.shape:
        got = f"{record.codes.dtype}, {tuple(expanded.shape)} beside {record.shape}"
        fail("load", name, f"the fields of one {kind}", got, REMEDY, CheckpointError)
    return record


# Blocks of GGUF.


def from_blocks(data: Json, start: int, rows: int, columns: int, kind: str) -> Weight:
    """The record of a matrix in GGUF blocks, bit for bit."""
    stored, count = BLOCKS[kind], columns // SIZE
    raw = np.frombuffer(data, np.uint8, rows * count * stored, start).reshape(rows, count, stored)
    half = lambda first: torch.from_numpy(
        raw[..., first : first + 2].copy().view(np.float16)[..., 0]
    )
    scale, head = half(0), 4 if kind == "Q4_1" else 2
    codes = torch.from_numpy(raw[..., head:].copy()).flatten(-2)
    if kind == "Q8_0":
        return quantization.Int8(codes.view(torch.int8), scale)
    zero = half(2) if kind == "Q4_1" else -8 * scale
    if not torch.equal(zero.float(), -8 * scale.float()) and kind == "Q4_0":  # beyond float16
        scale, zero = scale.float(), -8 * scale.float()
    return quantization.Int4(codes, scale, zero)
