"""GGUF files byte by byte: what the gguf package would not write can be written here."""

import struct


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, kind: int, layout: str, *values) -> bytes:
    return text(name) + struct.pack("<I" + layout, kind, *values)


def tensor(name: str, sizes=(4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file(fields=(), tensors=(), data: bytes = b"", *, version=3, counts=None, align=32) -> bytes:
    tensor_count, field_count = counts or (len(tensors), len(fields))
    header = (
        b"GGUF"
        + struct.pack("<IQQ", version, tensor_count, field_count)
        + b"".join([*fields, *tensors])
    )
    return header + bytes(-len(header) % align) + data
