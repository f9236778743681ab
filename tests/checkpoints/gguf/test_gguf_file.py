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
from samples import CONFIG, params, same, write_gguf

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
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
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
        ({}, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "unknown: blk.0.attn_q.bias"),
        ({}, {"rope_freqs.weight": np.full(8, 3, np.float32)}, "rope_freqs.weight"),
    ],
    ids=str,
)
def test_a_model_that_is_not_the_one_described_is_refused(tmp_path, change, extra, named):
    with pytest.raises(CheckpointError) as error:
        load(write_gguf(tmp_path / "a.gguf", change=change, extra=extra))
    assert named in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match="empty"):
        load(tmp_path / "a.gguf")
