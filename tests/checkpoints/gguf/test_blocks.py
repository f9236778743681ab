"""Blocks that stay quantized: the matrix of the record is what the gguf package dequantizes, bit
for bit, and products are those with it.
"""

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import funcattn as fa
from funcattn.checkpoints.gguf.blocks import KEPT, from_blocks
from funcattn.layers import embed, linear, prepare
from funcattn.quantization import expand

ROWS, BLOCKS = 7, 3


def stored(kind, seed=7):
    """Random bytes without halves of NaN, as they lie in a file behind others."""
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(seed).integers(0, 256, (ROWS, BLOCKS * size), np.uint8)
    for block in range(BLOCKS):
        for first in {"Q3_K": [108], "Q6_K": [208], "MXFP4": []}.get(kind, [0, 2]):
            raw[:, block * size + first + 1] &= 0x3B
        if kind == "MXFP4":
            raw[:, block * size] %= 150
    return raw


@pytest.fixture(scope="module", params=sorted(KEPT))
def kept(request):
    """The name of a type, the record of random blocks, and the matrix by the gguf package."""
    kind, raw = request.param, stored(request.param)
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    matrix = quants.dequantize(raw, GGMLQuantizationType[kind])
    record = from_blocks(b"pad" + raw.tobytes(), 3, ROWS, BLOCKS * block, kind)
    return kind, record, torch.from_numpy(matrix.astype(np.float32))


def test_a_kept_matrix_is_the_dequantized_one(kept):
    _, record, matrix = kept
    assert record.shape == tuple(matrix.shape)
    assert torch.equal(expand(record), matrix)
    assert torch.equal(embed(record, torch.tensor([[3, 0]])), matrix[torch.tensor([[3, 0]])])


@pytest.mark.parametrize("T", [1, 5])
def test_a_product_is_as_near_as_that_of_floats(kept, T):
    """The digits of x are within 2^-23 of the largest of their block, here at most 4 times its
    mean, and 24 blocks are summed in float32: 2^-21 + 24 2^-24 of |w| |x|, codes and zeros each.
    """
    _, record, matrix = kept
    x = fa.random.normal(fa.key(T), (T, matrix.shape[1]))
    want = x.double() @ matrix.double().mT
    terms = matrix
    if hasattr(record, "zero"):
        terms = expand(record._replace(scale=record.scale.abs(), zero=record.zero.abs()))
    bound = 2.0**-19 * (x.double().abs() @ terms.double().abs().mT)
    for weight in (record, prepare(record, T)):
        assert ((linear(weight, x) - want).abs() <= bound).all()


def test_a_derivative_is_that_of_the_matrix(kept):
    _, record, matrix = kept
    x = fa.random.normal(fa.key(1), (matrix.shape[1],))
    jacobian = torch.func.jacrev(lambda x: linear(record, x))(x)
    torch.testing.assert_close(jacobian, matrix, rtol=1e-6, atol=1e-6)
    many = torch.func.vmap(lambda x: linear(record, x))(torch.stack([x, -x]))
    torch.testing.assert_close(
        many[0], linear(record, x), rtol=1e-5, atol=1e-4 * matrix.abs().max()
    )


BYTES = {"Q4_K": 6, "Q5_K": 10, "Q6_K": 10, "Q3_K": 10, "Q8_0": 8.5, "Q4_0": 5, "IQ4_XS": 9}


@pytest.mark.parametrize("kind", BYTES)
def test_a_record_has_so_many_bits_a_weight(kind):
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    record = from_blocks(stored(kind).tobytes(), 0, ROWS, BLOCKS * block, kind)
    bits = 8 * sum(field.nbytes for field in record) / (ROWS * BLOCKS * block)
    assert bits == BYTES[kind]
