"""GGUF files: what the gguf package writes is read, and what is not whole is refused before
anything is allocated.
"""

import dataclasses
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_bytes import field, file, tensor
from samples import CONFIG, metadata, params, same, write_gguf

from funcattn import tree
from funcattn.checkpoints import CheckpointError, load
from funcattn.checkpoints.gguf.file import read_tensor
from funcattn.checkpoints.gguf.header import READ, Entry, read_header
from funcattn.families import leaves

# What is there is read.


def test_every_field_is_what_the_gguf_package_reads(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        change={
            "x.numbers": [1, -2, 3],
            "x.reals": [0.5, -1.5],
            "x.flag": True,
            "x.text": "Zürich ☃",
        },
    )
    header, theirs = read_header(path.read_bytes(), "a.gguf"), gguf.GGUFReader(path)
    expected = {
        name: entry.contents()
        for name, entry in theirs.fields.items()
        if not name.startswith("GGUF.")
    }
    ours = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in header.metadata.items()
    }
    assert ours == {
        name: float(str(np.float32(value))) if isinstance(value, float) else value
        for name, value in expected.items()
    }
    assert {entry.name: (entry.data_offset, entry.n_bytes) for entry in theirs.tensors} == {
        name: (entry.start, entry.size) for name, entry in header.tensors.items()
    }


def test_every_type_is_read_that_the_gguf_package_dequantizes():
    def is_dequantized(kind):
        try:
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name for kind in GGMLQuantizationType if is_dequantized(kind)} == set(READ)


@pytest.mark.parametrize("kind", READ)
def test_a_tensor_is_dequantized_as_the_gguf_package_does_it(kind):
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    stored = np.random.default_rng(7).integers(0, 256, (3, 2 * size), np.uint8)
    stored[:, 1::2] &= 0x3B  # no exponent of all ones: a half of NaN equals nothing
    shape = (3, 2 * block)
    ours = read_tensor(b"pad" + stored.tobytes(), Entry(shape, kind, 3, stored.size))
    theirs = quants.dequantize(stored, GGMLQuantizationType[kind])
    assert (ours.dtype, tuple(ours.shape)) == (torch.float32, shape)
    assert ours.numpy().tobytes() == theirs.astype(np.float32).tobytes()


def test_the_packaged_model_is_dequantized_as_the_gguf_package_does_it(smollm2):
    from funcattn.checkpoints.sources import locate

    found = {entry.name: entry for entry in gguf.GGUFReader(locate("smollm2-135m")).tensors}
    for name, leaf in [
        ("token_embd.weight", smollm2.params.embedding),
        ("blk.7.attn_v.weight", smollm2.params.layers[7].v),
        ("blk.29.ffn_down.weight", smollm2.params.layers[29].down),
        ("output_norm.weight", smollm2.params.norm),
    ]:
        assert (
            leaf.cpu().numpy().tobytes()
            == quants.dequantize(found[name].data, found[name].tensor_type).tobytes()
        )


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_full_precision_come_back_bit_for_bit(tmp_path, tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    loaded = load(write_gguf(tmp_path / "a.gguf", config, params(config)))
    assert loaded.config == config
    assert same(loaded.params, params(config))


def test_quantized_weights_come_back_as_their_blocks_say(tmp_path):
    loaded = load(write_gguf(tmp_path / "a.gguf", kind="Q4_1"))
    for path, leaf in leaves(params()).items():
        wanted = leaf.cpu().numpy()
        if leaf.ndim == 2:  # blocks lie along a row, so to reorder rows and to quantize commute
            wanted = quants.dequantize(
                quants.quantize(wanted, GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1
            )
        assert leaves(loaded.params)[path].numpy().tobytes() == wanted.tobytes(), path


def test_every_weight_has_the_dtype_that_was_asked_for(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", kind="Q8_0")
    half, full = load(path, dtype=torch.bfloat16), load(path)
    assert {leaf.dtype for leaf in leaves(half.params).values()} == {torch.bfloat16}
    assert torch.equal(half.params.layers[1].k, full.params.layers[1].k.bfloat16())
    with pytest.raises(TypeError, match="dtype"):
        load(path, dtype=torch.int8)


def test_the_weights_outlive_the_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    loaded = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(loaded.params, params())


# What is not whole is refused.

REFUSED = {
    "another magic": (b"GGML" + bytes(100), "magic"),
    "nothing": (b"", "magic"),
    "version 1": (file(version=1), "version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more fields than bytes": (file(counts=(0, 2**63)), "bytes that are left"),
    "more tensors than bytes": (file(counts=(2**63, 0)), "bytes that are left"),
    "a name longer than the file": (file([struct.pack("<Q", 2**62)]), "name of a field"),
    "a text longer than the file": (file([field("a", 8, "Q", 2**63)]), "a at byte"),
    "a text that is not UTF-8": (file([field("a", 8, "Q2s", 2, b"\xff\xfe")]), "UTF-8"),
    "more strings than bytes": (file([field("a", 9, "IQ", 8, 2**60)]), "strings"),
    "more numbers than bytes": (file([field("a", 9, "IQ", 4, 2**62)]), "bytes that are left"),
    "an array of arrays": (file([field("a", 9, "IQ", 9, 1)]), "array of arrays"),
    "an unknown kind": (file([field("a", 13, "Q", 0)]), "kind of a"),
    "one field twice": (file([field("a", 0, "B", 1)] * 2), "one of its name"),
    "one tensor twice": (file(tensors=[tensor("a")] * 2, data=bytes(32)), "one of its name"),
    "five axes": (file(tensors=[tensor("a", (1,) * 5)], data=bytes(32)), "axes"),
    "no axes": (file(tensors=[tensor("a", ())], data=bytes(32)), "shape ()"),
    "an axis of nothing": (file(tensors=[tensor("a", (4, 0))], data=bytes(32)), "shape (0, 4)"),
    "sizes whose product is 2^128": (
        file(tensors=[tensor("a", (2**63, 2**63, 4))], data=bytes(32)),
        "within the",
    ),
    "half a block": (file(tensors=[tensor("a", (48,), 2)], data=bytes(64)), "whole blocks of 32"),
    "an offset off the alignment": (
        file(tensors=[tensor("a", offset=4)], data=bytes(64)),
        "multiple of 32",
    ),
    "an offset past the end": (
        file(tensors=[tensor("a", offset=2**62)], data=bytes(32)),
        "within the",
    ),
    "one byte too few": (file(tensors=[tensor("a")], data=bytes(15)), "within the"),
    "tensors that overlap": (
        file(tensors=[tensor("a", (16,)), tensor("b", offset=32)], data=bytes(64)),
        "after a",
    ),
    "an alignment of 48": (file([field("general.alignment", 4, "I", 48)]), "power of two"),
    "an alignment in words": (
        file([field("general.alignment", 8, "Q2s", 2, b"32")]),
        "power of two",
    ),
    "a type without arithmetic": (file(tensors=[tensor("a", (32,), 9)], data=bytes(64)), "Q8_1"),
    "integers": (file(tensors=[tensor("a", (8,), 26)], data=bytes(32)), "I32"),
    "an unknown type": (file(tensors=[tensor("a", (8,), 999)], data=bytes(32)), "number 999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_header_is_refused_that_has(case):
    data, named = REFUSED[case]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read_header(data, "x.gguf")
        assert tracemalloc.get_traced_memory()[1] < 2**20  # whatever the counts say
    finally:
        tracemalloc.stop()
    assert named in str(error.value)
    assert "x.gguf" in str(error.value)


def test_the_files_of_the_refusals_are_read_without_their_fault():
    fields = [field("a", 9, "IQ2H", 2, 2, 7, 8), field("general.alignment", 4, "I", 32)]
    header = read_header(
        file(fields, [tensor("t", (4,)), tensor("u", (32,), 2, 32)], bytes(50)), "x.gguf"
    )
    assert header.metadata["a"].tolist() == [7, 8]
    assert [entry.size for entry in header.tensors.values()] == [16, 18]


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", kind="Q4_0")
    whole = path.read_bytes()
    for length in sorted({*range(200), *range(200, len(whole), 211), len(whole) - 64}):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load(path)


@pytest.mark.parametrize(
    ("change", "extra", "named"),
    [
        ({"general.architecture": "qwen9"}, {}, "qwen9"),
        ({"split.count": 3}, {}, "gguf-split --merge"),
        ({"split.count": "three"}, {}, "gguf-split --merge"),
        ({"llama.block_count": 3}, {}, "missing: blk.2.attn_norm.weight"),
        (
            {"llama.feed_forward_length": 128},
            {},
            "of another shape: blk.0.ffn_gate.weight (96, 64) instead of (128, 64)",
        ),
        ({}, {"blk.0.attn_q.scale": np.zeros(1, np.float32)}, "unknown: blk.0.attn_q.scale"),
        ({}, {"blk.1.attn_q.bias": np.zeros(64, np.float32)}, "unknown: blk.1.attn_q.bias"),
        ({}, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "missing: blk.0.attn_k.bias"),
        ({}, {"rope_freqs.weight": np.full(8, 3, np.float32)}, "rope_freqs.weight"),
    ],
    ids=str,
)
def test_a_model_that_is_not_the_one_described_is_refused(tmp_path, change, extra, named):
    with pytest.raises(CheckpointError) as error:
        load(write_gguf(tmp_path / "a.gguf", change=change, extra=extra))
    assert named in str(error.value)


# Models in several files.


def split(folder, count, change=None):
    """The sample model as gguf-split writes it; `change` is made to the fields of the last part."""
    whole = gguf.GGUFReader(write_gguf(folder / "whole.gguf", kind="Q8_0"))
    fields = read_header((folder / "whole.gguf").read_bytes(), "whole.gguf").metadata
    for number in range(count):
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        said = {"split.no": number, "split.count": count, "split.tensors.count": len(whole.tensors)}
        said |= dict(change or {}) if number == count - 1 else {}
        for name, value in said.items():
            add = writer.add_array if isinstance(value, list) else writer.add_uint32
            add(name, value)
        if number == 0:
            for name in fields:
                entry = whole.fields[name]
                if name != "general.architecture":
                    sub = entry.types[1] if len(entry.types) > 1 else None
                    writer.add_key_value(name, entry.contents(), entry.types[0], sub)
        for entry in whole.tensors[number::count]:
            writer.add_tensor(entry.name, entry.data, raw_dtype=entry.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"m-00001-of-{count:05}.gguf"


@pytest.mark.parametrize("keep", [False, True])
def test_a_split_model_is_the_whole_one(tmp_path, keep):
    parts = load(split(tmp_path, 3), keep_quantized=keep)
    whole = load(tmp_path / "whole.gguf", keep_quantized=keep)
    assert parts.config == whole.config
    assert parts.tokenizer.encode("hello") == whole.tokenizer.encode("hello")
    ours, theirs = tree.items(parts.params), tree.items(whole.params)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_a_split_model_lacks_no_part(tmp_path):
    first = split(tmp_path, 3)
    with pytest.raises(CheckpointError, match="first part of a split file"):
        load(tmp_path / "m-00002-of-00003.gguf")
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="gguf-split"):
        load(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").rename(first)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="m-00003-of-00003"):
        load(first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split.no": 1}, "part 1 of 3"),
        ({"split.count": 4}, "part 2 of 4"),
        ({"split.count": [3, 3]}, "part 2 of"),
    ],
    ids=str,
)
def test_a_part_of_another_model_is_refused(tmp_path, change, named):
    with pytest.raises(CheckpointError, match=named):
        load(split(tmp_path, 3, change))


def test_tensors_in_two_parts_are_refused(tmp_path):
    first, second = split(tmp_path, 2), tmp_path / "m-00002-of-00002.gguf"
    twin, other = (
        next(entry.name for entry in gguf.GGUFReader(path).tensors if ".attn_o" in entry.name)
        for path in (first, second)
    )
    second.write_bytes(second.read_bytes().replace(other.encode(), twin.encode()))
    with pytest.raises(CheckpointError, match="1 others"):
        load(first)


def test_a_split_model_has_as_many_tensors_as_it_says(tmp_path):
    first = split(tmp_path, 2)
    count = struct.pack(
        "<II", 4, read_header(first.read_bytes(), "").metadata["split.tensors.count"]
    )
    said = b"split.tensors.count"
    first.write_bytes(first.read_bytes().replace(said + count, said + struct.pack("<II", 4, 99)))
    with pytest.raises(CheckpointError, match="99 in all"):
        load(first)


def test_a_file_without_a_tokenizer_is_a_model_alone(tmp_path):
    bare = {name: None for name in metadata() if name.startswith("tokenizer.")}
    for change in (bare, {**bare, "tokenizer.ggml.model": "none"}):
        loaded = load(write_gguf(tmp_path / "a.gguf", change=change))
        assert loaded.tokenizer is None
        assert same(loaded.params, params())


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match="empty"):
        load(tmp_path / "a.gguf")
