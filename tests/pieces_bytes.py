"""tokenizer.model byte by byte: the protocol buffer of a small SentencePiece tokenizer."""

import struct

WORDS = ["▁", *"helotw12,", "▁t", "he", "ll", "hell", "hello", "▁hello", "▁th", "the", "▁the", "12"]
PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<turn>", 0.0, 4),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    *((word, -float(number), 1) for number, word in enumerate(WORDS)),
]


def varint(number):
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value % 2**64)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model(pieces=PIECES, *, kind=2, space=1, spaces=0, charsmap=b"", ids=()):
    listed = [
        field(1, field(1, text.encode()) + field(2, score) + field(3, what))
        for text, score, what in pieces
    ]
    trainer = field(3, kind) + b"".join(field(number, value) for number, value in ids)
    normalizer = field(1, b"identity") + field(2, charsmap) + field(3, space) + field(4, spaces)
    return b"".join(listed) + field(2, trainer) + field(3, normalizer)
