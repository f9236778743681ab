"""Matrices as quantization tools write them, made by the definition of each format with loops over
numpy integers, and what they mean in float64.

A case is a function (rng, N, K) -> Coded; `CASES` has one for each way of a format.
"""

import json
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the output at nibble 0, 1, ... of a word


class Coded(NamedTuple):
    """tensors: end of the name behind the module -> tensor. matrix: float64 (N, K). codes: integers
    (N, K) as the record has them, or None where it is dequantized.
    """

    tensors: dict
    matrix: np.ndarray
    codes: object = None
    scale: object = None


def packed(codes, bits, axis):
    """Codes along an axis in words of 32 bits, the low bits first."""
    codes = np.moveaxis(codes, axis, 0).astype(np.uint64)
    each = 32 // bits
    words = np.zeros((-(-len(codes) // each), *codes.shape[1:]), np.uint64)
    for i, row in enumerate(codes):
        words[i // each] |= row << np.uint64(bits * (i % each))
    return torch.from_numpy(np.moveaxis(words, 0, axis).astype(np.uint32).view(np.int32).copy())


def halves(rng, *shape):
    return rng.uniform(0.01, 0.1, shape).astype(np.float16)


def gptq(rng, N, K, bits=4, group=32, version="gptq", order=False, symmetric=False, uneven=False):
    size = K if group == -1 else group
    codes, G = rng.integers(0, 2**bits, (K, N)), K // size
    points = np.full((G, N), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (G, N))
    scale = halves(rng, G, N)
    of = np.arange(K) // size
    if order:
        of = rng.permutation(of)
    if uneven:
        of[of == 1] = 0
    matrix = (codes - points[of]) * scale[of].astype(np.float64)
    tensors = {
        "qweight": packed(codes, bits, 0),
        "qzeros": packed(points - (version == "gptq"), bits, 1),
        "scales": torch.from_numpy(scale),
        "g_idx": torch.from_numpy(of.astype(np.int32)),
    }
    kept = bits == 4 or not order
    arranged = codes[np.argsort(of, kind="stable")].T - (128 if bits == 8 and symmetric else 0)
    return Coded(tensors, matrix.T, arranged if kept and not uneven else None, scale.T)


def awq(rng, N, K, group=32):
    codes, points = rng.integers(0, 16, (K, N)), rng.integers(0, 16, (K // group, N))
    scale = halves(rng, K // group, N)
    mixed = lambda x: x.reshape(len(x), -1, 8)[..., AWQ_ORDER].reshape(x.shape)
    tensors = {
        "qweight": packed(mixed(codes), 4, 1),
        "qzeros": packed(mixed(points), 4, 1),
        "scales": torch.from_numpy(scale),
    }
    of = np.arange(K) // group
    matrix = (codes - points[of]) * scale[of].astype(np.float64)
    return Coded(tensors, matrix.T, codes.T, scale.T)


def pack_quantized(rng, N, K, bits=4, group=32, symmetric=True, order=False):
    size = group or K
    G, half = K // size, 2 ** (bits - 1)
    codes = rng.integers(-half, half, (N, K))
    points = np.zeros((N, G), int) if symmetric else rng.integers(-half, half, (N, G))
    scale = halves(rng, N, G)
    of = np.arange(K) // size
    if order:
        of = rng.permutation(of)
    tensors = {
        "weight_packed": packed(codes + half, bits, 1),
        "weight_scale": torch.from_numpy(scale).bfloat16(),
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed(points + half, bits, 0)
    if order:
        tensors["weight_g_idx"] = torch.from_numpy(of.astype(np.int32))
    exact = tensors["weight_scale"].double().numpy()
    kept = codes[:, np.argsort(of, kind="stable")] + (half if bits == 4 or not symmetric else 0)
    return Coded(tensors, (codes - points[:, of]) * exact[:, of], kept, exact)


def int_quantized(rng, N, K, group=None, shifted=False):
    G = K // (group or K)
    codes = rng.integers(-100, 100, (N, K))
    points = rng.integers(-20, 20, (N, G)) if shifted else np.zeros((N, G), int)
    scale = torch.from_numpy(halves(rng, N, G)).bfloat16()
    tensors = {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scale}
    if shifted:
        tensors["weight_zero_point"] = torch.from_numpy(points).to(torch.int8)
    spread = lambda x: np.repeat(x, K // G, 1)
    matrix = (codes - spread(points)) * spread(scale.double().numpy())
    kept = codes + 128 if shifted else codes  # from 0 where there is a zero point
    return Coded(tensors, matrix, kept, scale.double().numpy())


def float8(rng, N, K, block=None, name="weight_scale_inv", one=False, kind=torch.float8_e4m3fn):
    codes = torch.from_numpy(rng.normal(size=(N, K))).to(kind)
    rows, columns = (N, K) if one else block or (1, K)
    counts = (1,) if one else (-(-N // rows), -(-K // columns))
    scale = torch.from_numpy(rng.uniform(0.01, 0.1, counts).astype(np.float32))
    spread = scale.double().numpy().reshape(-1, 1 if one else counts[1])
    spread = np.repeat(np.repeat(spread, rows, 0)[:N], columns, 1)[:, :K]
    wide = codes.double().numpy()
    kept = wide if K % columns == 0 or counts[-1] == 1 else None
    return Coded({"weight": codes, name: scale}, wide * spread, kept)


def bnb4(rng, N, K, kind="nf4", nested=True):
    codes, levels = rng.integers(0, 16, N * K), np.sort(rng.normal(size=16)).astype(np.float32)
    blocks = N * K // 64
    absmax = rng.uniform(0.5, 1, blocks).astype(np.float32)
    told = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [N, K]}
    tensors = {
        "weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]),
        "weight.quant_map": torch.from_numpy(levels),
    }
    if nested:
        small = rng.integers(0, 256, blocks).astype(np.uint8)
        table = np.sort(rng.normal(size=256)).astype(np.float32)
        of_256 = rng.uniform(0.5, 1, -(-blocks // 256)).astype(np.float32)
        told |= {"nested_blocksize": 256, "nested_offset": 0.75, "nested_dtype": "float32"}
        absmax = table[small] * of_256[np.arange(blocks) // 256] + np.float32(0.75)
        tensors["weight.absmax"] = torch.from_numpy(small)
        tensors["weight.nested_quant_map"] = torch.from_numpy(table)
        tensors["weight.nested_absmax"] = torch.from_numpy(of_256)
    else:
        tensors["weight.absmax"] = torch.from_numpy(absmax)
    state = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = state
    matrix = levels[codes].astype(np.float64) * np.repeat(absmax.astype(np.float64), 64)
    kept = codes.reshape(N, K) if K % 64 == 0 else None
    return Coded(tensors, matrix.reshape(N, K), kept, absmax.reshape(N, -1) if K % 64 == 0 else 0)


def bnb8(rng, N, K):
    codes = rng.integers(-127, 128, (N, K))
    scb = rng.uniform(1, 2, N).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(codes).to(torch.int8),
        "SCB": torch.from_numpy(scb),
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return Coded(tensors, codes * (scb.astype(np.float64) / 127)[:, None], codes)


def nvfp4(rng, N, K):
    codes = rng.integers(0, 16, (N, K))
    scale = torch.from_numpy(rng.uniform(1, 100, (N, K // 16))).to(torch.float8_e4m3fn)
    whole = torch.tensor([2016.0])  # its reciprocal would round half of the scales otherwise
    tensors = {
        "weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "weight_scale": scale,
        "weight_global_scale": whole,
        "input_global_scale": torch.ones(1),
    }
    by = (scale.float() / whole).double().numpy()
    matrix = FP4[codes] * np.repeat(by, 16, 1)
    return Coded(tensors, matrix, codes, scale.double().numpy())


def mxfp4_linear(rng, N, K):
    codes, exponents = rng.integers(0, 16, (N, K)), rng.integers(100, 130, (N, K // 32))
    tensors = {
        "weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "weight_scale": torch.from_numpy(exponents.astype(np.uint8)),
    }
    by = 2.0 ** (exponents - 127)
    return Coded(tensors, FP4[codes] * np.repeat(by, 32, 1), codes, by)


def mlx(rng, N, K, bits=4, group=32):
    codes = rng.integers(0, 2**bits, (N, K))
    scale, bias = halves(rng, N, K // group), -halves(rng, N, K // group)
    tensors = {
        "weight": packed(codes, bits, 1).view(torch.uint32),
        "scales": torch.from_numpy(scale),
        "biases": torch.from_numpy(bias),
    }
    spread = lambda x: np.repeat(x.astype(np.float64), group, 1)
    return Coded(tensors, codes * spread(scale) + spread(bias), codes, scale)


def hqq(rng, N, K, bits=4, axis=1, group=32):
    rows = N * K // group
    codes = rng.integers(0, 2**bits, (rows, group) if axis else (group, rows))
    scale = halves(rng, *((rows, 1) if axis else (1, rows)))
    zero = rng.uniform(5, 9, scale.shape).astype(np.float16)
    step, high = len(codes) * bits // 8, 8 - bits
    coded = np.zeros((step, codes.shape[1]), np.uint8)
    for i in range(8 // bits):
        coded |= (codes[i * step : (i + 1) * step] << (high - bits * i)).astype(np.uint8)
    text = lambda x: torch.tensor([ord(letter) for letter in x], dtype=torch.uint8)
    tensors = {
        "W_q": torch.from_numpy(coded),
        "scale": torch.from_numpy(scale),
        "zero": torch.from_numpy(zero),
        "shape": torch.tensor([N, K]),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": text(f"{bits}bit_u8"),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
        "compute_dtype": text("torch.float16"),
        "stores_quant_config": torch.tensor(1, dtype=torch.uint8),
    }
    matrix = (codes - zero.astype(np.float64)) * scale.astype(np.float64)
    kept = codes.reshape(N, K) if axis else None
    return Coded(tensors, matrix.reshape(N, K), kept, scale.reshape(N, -1) if axis else 0)


def torchao(rng, N, K, kind="Int8Tensor"):
    if kind == "Float8Tensor":
        made = float8(rng, N, K, name="_weight_scale")
        coded = made.tensors.pop("weight")
        return made._replace(tensors={"_weight_qdata": coded, **made.tensors})
    group = 32 if kind == "IntxUnpackedToInt8Tensor" else None
    made = int_quantized(rng, N, K, group, shifted=group is not None)
    names = {"weight": "qdata", "weight_scale": "scale", "weight_zero_point": "zero_point"}
    return made._replace(tensors={f"_weight_{names[name]}": x for name, x in made.tensors.items()})


def of_groups(format, **weights):
    group = {"targets": ["Linear"], "weights": {"type": "int", "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def of_gptq(**changes):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, **changes}


BNB = {"quant_method": "bitsandbytes"}
GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
FLOAT = {"type": "float", "num_bits": 8, "symmetric": True}
CASES = {  # name -> (a matrix, settings)
    "gptq": (gptq, of_gptq()),
    "gptq v2": (partial(gptq, version="gptq_v2"), of_gptq(checkpoint_format="gptq_v2")),
    "gptq symmetric": (partial(gptq, symmetric=True), of_gptq(sym=True)),
    "gptq by rows": (partial(gptq, group=-1), of_gptq(group_size=-1)),
    "gptq in act-order": (partial(gptq, order=True), of_gptq(desc_act=True)),
    "gptq uneven": (partial(gptq, uneven=True), of_gptq(desc_act=True)),
    "gptq 8 bits": (partial(gptq, bits=8, symmetric=True), of_gptq(bits=8)),
    "gptq 8 bits with zeros": (partial(gptq, bits=8), of_gptq(bits=8)),
    "gptq 8 bits in act-order": (
        partial(gptq, bits=8, symmetric=True, order=True),
        of_gptq(bits=8, desc_act=True),
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "pack-quantized": (pack_quantized, of_groups("pack-quantized", symmetric=True, **GROUPS)),
    "pack-quantized with zeros": (
        partial(pack_quantized, symmetric=False),
        of_groups("pack-quantized", symmetric=False, **GROUPS),
    ),
    "pack-quantized in act-order": (
        partial(pack_quantized, order=True),
        of_groups("pack-quantized", actorder="group", **GROUPS),
    ),
    "pack-quantized 8 bits": (
        partial(pack_quantized, bits=8, group=None),
        of_groups("pack-quantized", num_bits=8, strategy="channel"),
    ),
    "pack-quantized 8 bits with zeros": (
        partial(pack_quantized, bits=8, symmetric=False),
        of_groups("pack-quantized", **{**GROUPS, "num_bits": 8, "symmetric": False}),
    ),
    "int-quantized": (int_quantized, of_groups("int-quantized", num_bits=8, strategy="channel")),
    "int-quantized with zeros": (
        partial(int_quantized, group=32, shifted=True),
        of_groups("int-quantized", **{**GROUPS, "num_bits": 8, "symmetric": False}),
    ),
    "float-quantized": (
        partial(float8, name="weight_scale"),
        of_groups("float-quantized", strategy="channel", **FLOAT),
    ),
    "float-quantized whole": (
        partial(float8, name="weight_scale", one=True),
        of_groups("float-quantized", strategy="tensor", **FLOAT),
    ),
    "float-quantized by blocks": (
        partial(float8, name="weight_scale", block=(16, 32)),
        of_groups("float-quantized", strategy="block", block_structure=[16, 32], **FLOAT),
    ),
    "nvfp4": (
        nvfp4,
        of_groups(
            "nvfp4-pack-quantized",
            **{**FLOAT, "num_bits": 4, "group_size": 16},
            strategy="tensor_group",
        ),
    ),
    "mxfp4": (
        mxfp4_linear,
        of_groups("mxfp4-pack-quantized", **{**FLOAT, "num_bits": 4, "group_size": 32}),
    ),
    "fp8": (
        partial(float8, block=(32, 32)),
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
    ),
    "fp8 cut off": (
        partial(float8, block=(40, 40)),
        {"quant_method": "fp8", "weight_block_size": [40, 40]},
    ),
    "fp8 whole": (partial(float8, one=True), {"quant_method": "fp8"}),
    "fbgemm": (partial(float8, name="weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "bitsandbytes nf4": (bnb4, {**BNB, "load_in_4bit": True}),
    "bitsandbytes fp4": (partial(bnb4, kind="fp4", nested=False), {**BNB, "load_in_4bit": True}),
    "bitsandbytes int8": (bnb8, {**BNB, "load_in_8bit": True}),
    "mlx": (mlx, {"bits": 4, "group_size": 32}),
    "mlx 2 bits": (partial(mlx, bits=2), {"bits": 2, "group_size": 32}),
    "mlx 8 bits": (partial(mlx, bits=8), {"bits": 8, "group_size": 32}),
    "hqq": (hqq, {"quant_method": "hqq"}),
    "hqq 2 bits": (partial(hqq, bits=2), {"quant_method": "hqq"}),
    "hqq 8 bits": (partial(hqq, bits=8), {"quant_method": "hqq"}),
    "hqq of outputs": (partial(hqq, axis=0), {"quant_method": "hqq"}),
    "torchao": (torchao, {"quant_method": "torchao"}),
    "torchao float8": (partial(torchao, kind="Float8Tensor"), {"quant_method": "torchao"}),
    "torchao intx": (
        partial(torchao, kind="IntxUnpackedToInt8Tensor"),
        {"quant_method": "torchao"},
    ),
}
