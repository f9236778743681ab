"""bitsandbytes: 4 bits (nf4, fp4; scales quantized too, or not) and 8 bits.

    weight (N K / 2, 1), two codes a byte, the first in the high bits, along the flat matrix
    weight.absmax (N K / 64,)   weight.quant_map (16,)   weight.quant_state.bitsandbytes__nf4: JSON
    w = quant_map[code] absmax, or with quantized scales
    absmax = nested_quant_map[absmax] nested_absmax[i // 256] + nested_offset

    weight int8 (N, K)   SCB (N,)            w = weight SCB / 127

Features of activations beyond llm_int8_threshold are not treated apart, nor others rounded.

Source: Dettmers et al., QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339; bitsandbytes.
"""

import json
import math
from collections.abc import Mapping

import torch

from .... import quantization
from ....layers import Weight
from ...families.tables import LARGEST, Json
from . import codes
from .stored import Dense, Read, Stored, Tensors, wrong

STATE = ".weight.quant_state.bitsandbytes__"
MAX_STATE = 4096  # bytes
NUMBERS = ("blocksize", "nested_blocksize")


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of bitsandbytes."""
    four = [
        (module, kind) for kind in ("nf4", "fp4") for module in tensors.ending(f"{STATE}{kind}")
    ]
    lost = {*tensors.ending(".weight.absmax")} - {module for module, _ in four}
    if lost:
        wrong(f"{min(lost)}{STATE}nf4", "there, beside absmax", "none of this name")
    eight = [
        module
        for module in tensors.ending(".weight")
        if tensors.found[f"{module}.weight"].type == "I8"
    ]
    return [_four_bits(*one, tensors) for one in four] + [
        _eight_bits(one, tensors) for one in eight
    ]


def _eight_bits(module: str, tensors: Tensors) -> Stored:
    name, scale, layout = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    N, K = tensors.shape(name, ("I8",), (None, None))
    tensors.shape(scale, ("F32", "F16"), (N,))
    others = [layout] if layout in tensors.found else []

    def read(tensor: Read) -> Weight:
        if others and tensor(layout).any():
            tensors.refuse(layout, "0, rows one after the other", "another layout")
        return quantization.Int8(tensor(name), (tensor(scale).float() / 127).unsqueeze(-1))

    return Stored(name, (N, K), (name, scale, *others), read)


def _four_bits(module: str, kind: str, tensors: Tensors) -> Stored:
    weight = f"{module}.weight"
    state = f"{module}{STATE}{kind}"
    size = tensors.shape(state, ("U8",), (None,))[0]
    if size > MAX_STATE:
        tensors.refuse(state, f"at most {MAX_STATE} bytes", size)
    names = {part: f"{weight}.{part}" for part in ("absmax", "quant_map")}
    is_nested = f"{weight}.nested_absmax" in tensors.found
    if is_nested:
        names |= {part: f"{weight}.{part}" for part in ("nested_absmax", "nested_quant_map")}
        tensors.shape(names["nested_quant_map"], ("F32",), (256,))
    tensors.shape(names["quant_map"], ("F32",), (16,))
    tensors.shape(names["absmax"], ("U8",) if is_nested else ("F32",), (None,))
    said = _state(tensors, state, is_nested)
    N, K = said["shape"]
    block = said["blocksize"]
    total = tensors.shape(weight, ("U8",))
    if math.prod(total) * 2 != N * K:
        tensors.refuse(weight, f"of {N * K // 2} bytes, for ({N}, {K})", total)
    count = -(-N * K // block)
    tensors.shape(names["absmax"], ("U8", "F32"), (count,))
    if is_nested:
        tensors.shape(names["nested_absmax"], ("F32",), (-(-count // said["nested_blocksize"]),))

    def read(tensor: Read) -> Weight | Dense:
        scale = tensor(names["absmax"])
        if is_nested:
            of_blocks = tensor(names["nested_absmax"])[torch.arange(count) // said[NUMBERS[1]]]
            scale = tensor(names["nested_quant_map"])[scale.long()] * of_blocks
            scale = scale + said["nested_offset"]
        bytes_ = tensor(weight).flatten()
        pairs, levels = (bytes_ >> 4) | (bytes_ << 4), tensor(names["quant_map"])
        if K % block:
            numbers = levels[codes.unpacked(pairs, 4).long()]
            by = scale[torch.arange(N * K) // block]
            return Dense((numbers * by).reshape(N, K), "its blocks do not end with its rows")
        return codes.of_levels(pairs.reshape(N, K // 2), scale.reshape(N, -1), levels)

    return Stored(weight, (N, K), (weight, state, *names.values()), read)


def _state(tensors: Tensors, name: str, is_nested: bool) -> dict[str, Json]:
    """The JSON in a tensor of bytes."""
    try:
        found = json.loads(bytes(tensors.read(name).tolist()).decode())
    except (ValueError, RecursionError) as error:
        tensors.refuse(name, "JSON", f"an error: {str(error)[:100]}")
    is_size = lambda value: type(value) is int and 0 < value <= LARGEST
    sizes = found.get("shape") if isinstance(found, dict) else None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(map(is_size, sizes)):
        tensors.refuse(name, "an object with the shape of a matrix", repr(found)[:200])
    for field in NUMBERS[: 2 if is_nested else 1]:
        if not is_size(found.get(field)):
            tensors.refuse(name, f"with a positive {field}", repr(found)[:200])
    offset = found.get("nested_offset")
    if is_nested and (not isinstance(offset, float | int) or not math.isfinite(offset)):
        tensors.refuse(name, "with a finite nested_offset", repr(found)[:200])
    return found
