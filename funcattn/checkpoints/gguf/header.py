"""The header of a GGUF file: metadata (the tokenizer too), and where its tensors are.

    magic, version, number of tensors, number of fields
    field  = name, kind, value                              as many as said
    tensor = name, sizes (fastest first), type, offset      as many as said
    padding to `general.alignment`, then the data at the offsets

The header is parsed here and not by gguf.GGUFReader, which does not validate: every length, count
and offset is checked against the bytes that are left before memory for it is allocated, so memory
stays within a small multiple of the file. The quantized types, their block sizes and their
arithmetic are those of the `gguf` package.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json

READ = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "NVFP4",
)
LONGEST_NAME = 2**16 - 1  # bytes, by the specification
MOST_AXES = 4  # by the specification
# Bytes; the header of a vocabulary of 262 144 has 2**24. A sparse file would read as endless names.
LARGEST_HEADER = 2**26

NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "<u1",
}


class Entry(NamedTuple):
    """Location of a tensor: shape in torch's order, type, first byte, and number of bytes."""

    shape: tuple[int, ...]
    type: str
    start: int
    size: int


class Header(NamedTuple):
    """The header of a GGUF file. Arrays of numbers are numpy's, arrays of strings are lists."""

    metadata: dict[str, Json]
    tensors: dict[str, Entry]


class Cursor:
    """Reads bytes forward, and never beyond their end or the limit of a header."""

    def __init__(self, data: mmap.mmap | bytes, file: str):
        self.data, self.file, self.at = data, file, 0
        self.end = min(len(data), LARGEST_HEADER)

    def refuse(self, what: str, wanted: str, got: object) -> NoReturn:
        """Raise CheckpointError with the file and the byte."""
        remedy = "The file is damaged, cut off, or not GGUF: fetch it again."
        fail(
            "load", f"{what} at byte {self.at} of {self.file}", wanted, got, remedy, CheckpointError
        )

    def take(self, size: int, what: str) -> int:
        """The position of the next `size` bytes; fails where there are fewer."""
        left = self.end - self.at
        if size > left:
            self.refuse(what, f"at most the {left} bytes that are left", f"{size} bytes")
        self.at += size
        return self.at - size

    def number(self, layout: str, what: str) -> Json:
        """One number in the notation of `struct`."""
        return struct.unpack_from(
            "<" + layout, self.data, self.take(struct.calcsize("<" + layout), what)
        )[0]

    def string(self, what: str, longest: float = math.inf) -> str:
        """A length of 64 bits, then as many bytes of UTF-8."""
        size = self.number("Q", f"the length of {what}")
        if size > longest:
            self.refuse(what, f"at most {longest} bytes", f"{size} bytes")
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            self.refuse(what, "UTF-8", repr(self.data[start : start + min(size, 40)]))

    def numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
        """A copy of `count` numbers."""
        dtype = np.dtype(NUMBERS[kind])
        found = np.frombuffer(
            self.data, dtype, count, self.take(count * dtype.itemsize, what)
        ).copy()
        return found != 0 if kind == GGUFValueType.BOOL else found

    def value(self, what: str) -> Json:
        """The value of one field: a number, a string, or an array of these."""
        kind, count = self.kind(what), 1
        is_array = kind == GGUFValueType.ARRAY
        if is_array:
            kind, count = self.kind(what), self.number("Q", f"the length of {what}")
        if kind == GGUFValueType.STRING:
            if count * 8 > self.end - self.at:  # each has a length of 8 bytes
                self.refuse(
                    what, f"at most {(self.end - self.at) // 8} strings", f"{count} strings"
                )
            found = [self.string(what) for _ in range(count)]
            return found if is_array else found[0]
        if kind not in NUMBERS:
            self.refuse(what, "an array of numbers or strings", "an array of arrays")
        found = self.numbers(kind, count, what)
        if is_array:
            return found
        # the shortest decimal: 1e-5 stays 1e-5
        return float(str(found[0])) if kind == GGUFValueType.FLOAT32 else found[0].item()

    def kind(self, what: str) -> GGUFValueType:
        """The type of a value."""
        number = self.number("I", f"the kind of {what}")
        if number not in GGUFValueType._value2member_map_:
            self.refuse(f"the kind of {what}", f"from 0 to {max(GGUFValueType)}", number)
        return GGUFValueType(number)


# The header.


def read_header(data: mmap.mmap | bytes, file: str) -> Header:
    """Metadata and tensors of a GGUF file; raises CheckpointError for inconsistent sizes."""
    cursor = Cursor(data, file)
    if data[: cursor.take(4, "the magic") + 4] != b"GGUF":
        cursor.refuse("the magic", "GGUF", data[:4])
    version = cursor.number("I", "the version")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
        remedy = "Convert it: python -m gguf.scripts.gguf_convert_endian FILE little"
        fail(
            "load",
            f"the version of {file}",
            "little-endian, as the file",
            "big-endian",
            remedy,
            CheckpointError,
        )
    if version not in (2, 3):
        cursor.refuse("the version", "2 or 3, little-endian", version)
    tensor_count, field_count = (
        cursor.number("Q", "the number of tensors"),
        cursor.number("Q", "the number of fields"),
    )

    metadata: dict[str, Json] = {}
    for _ in range(field_count):  # terminates: each iteration reads some bytes
        name = cursor.string("the name of a field", LONGEST_NAME)
        if name in metadata:
            cursor.refuse("a field", "one of its name", repr(name))
        metadata[name] = cursor.value(name)

    described = {}
    for _ in range(tensor_count):
        name = cursor.string("the name of a tensor", LONGEST_NAME)
        if name in described:
            cursor.refuse("a tensor", "one of its name", repr(name))
        axes = cursor.number("I", f"the number of axes of {name}")
        if axes > MOST_AXES:
            cursor.refuse(f"the number of axes of {name}", f"at most {MOST_AXES}", axes)
        sizes = tuple(cursor.number("Q", f"the sizes of {name}") for _ in range(axes))
        described[name] = (
            sizes[::-1],
            cursor.number("I", f"the type of {name}"),
            cursor.number("Q", f"the offset of {name}"),
        )
    return Header(metadata, _place(cursor, metadata.get("general.alignment", 32), described))


def _place(
    cursor: Cursor, alignment: Json, described: Mapping[str, tuple[tuple[int, ...], int, int]]
) -> dict[str, Entry]:
    """The entries; fails where their bytes are outside of the file, unaligned or overlapping."""
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or not 0 < alignment <= 2**20
        or alignment & (alignment - 1)
    ):
        cursor.refuse("general.alignment", "a power of two", alignment)
    base = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, (shape, number, offset) in described.items():
        type_name = (
            GGMLQuantizationType(number).name
            if number in GGMLQuantizationType._value2member_map_
            else f"number {number}"
        )
        if type_name not in READ:
            remedy = f"Convert the file to one of {', '.join(READ)}."
            fail(
                "load",
                f"the type of {name} in {cursor.file}",
                "one that can be read",
                type_name,
                remedy,
                CheckpointError,
            )
        block, stored = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        if not shape or 0 in shape or shape[-1] % block or offset % alignment:
            cursor.refuse(
                name,
                f"rows of whole blocks of {block}, at a multiple of {alignment}",
                f"shape {shape} at {offset}",
            )
        tensors[name] = Entry(shape, type_name, base + offset, math.prod(shape) // block * stored)
    end, last = base, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start < end:
            cursor.refuse(name, f"after {last}, which ends at {end}", entry.start)
        end, last = entry.start + entry.size, name
        if end > len(cursor.data):
            cursor.refuse(
                name,
                f"within the {len(cursor.data)} bytes of the file",
                f"bytes {entry.start} to {end}",
            )
    return tensors
