"""torchao: tensor subclasses taken apart, with their class and settings in the header's metadata.

    ..._weight_qdata (N, K)   ..._weight_scale   ..._weight_zero_point       (of `...weight`)
    w = (qdata - zero_point) scale

Read are Int8Tensor, Float8Tensor and IntxUnpackedToInt8Tensor; their activations are not rounded.

Source: torchao.prototype.safetensors.
"""

import json
from collections.abc import Mapping

from ....layers import Weight
from ...families.tables import Json
from . import codes
from .stored import CONVERT, FLOATS, Dense, Read, Stored, Tensors, wrong

CODES = {
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Float8Tensor": ("F8_E4M3", "F8_E5M2"),
}


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of torchao."""
    return [_one(name, tensors) for name in tensors.ending("_qdata")]


def _one(prefix: str, tensors: Tensors) -> Stored:
    module, _, leaf = prefix.rpartition(".")
    name = f"{module}.{leaf.removeprefix('_')}"
    stored = tensors.found[f"{prefix}_qdata"].stored.removesuffix("_qdata")
    at, _, last = stored.rpartition(".")
    try:
        told = json.loads(tensors.metadata.get(f"{at}.{last.removeprefix('_')}", "null"))
    except (ValueError, RecursionError):
        told = None
    kind = told.get("_type") if isinstance(told, dict) else None
    if kind not in CODES:
        wanted = f"in the metadata with one of {', '.join(CODES)}"
        wrong(f"the class of {name}", wanted, repr(kind), CONVERT)
    coded, scale, zero = (f"{prefix}_{part}" for part in ("qdata", "scale", "zero_point"))
    N, K = tensors.shape(coded, CODES[kind], (None, None))
    given = tensors.shape(scale, FLOATS)
    G = given[1] if len(given) == 2 else 1
    if given not in ((), (1,), (N,), (1, 1), (N, G)) or K % G:
        tensors.refuse(scale, f"of one number, or of groups of ({N}, {K})", given)
    parts = [coded, scale]
    if kind == "IntxUnpackedToInt8Tensor" or (kind == "Int8Tensor" and zero in tensors.found):
        if tensors.shape(zero, ("I8", "I32", "I64", *FLOATS)) != given:
            tensors.refuse(zero, f"of shape {given}", tensors.found[zero].shape)
        parts.append(zero)
    others = [f"{prefix}_{part}" for part in ("act_quant_scale", "act_pre_scale")]
    for other in others:
        if other in tensors.found:
            tensors.refuse(other, "absent", "a scale of activations")

    def read(tensor: Read) -> Weight | Dense:
        by = tensor(scale).reshape(-1, G).expand(N, G).contiguous()
        if len(parts) > 2 and (points := tensor(zero)).float().any():
            if (points.float() != points.float().round()).any():
                tensors.refuse(zero, "integers", "others")
            return codes.eight_bits(tensor(coded), by, points.reshape(-1, G).expand(N, G))
        return codes.scaled_by_blocks(tensor(coded), by, 1, K // G)

    return Stored(name, (N, K), tuple(parts), read)
