"""Records of this library in the layouts of compressed-tensors and GPTQ, with the same codes.

    compressed-tensors   Int4, Int8: pack-quantized; Int8Dynamic by rows: int-quantized;
                         Fp8 by rows: float-quantized
    gptq                 Int4 and OrderedInt4, or Int8, all of one group

A zero point must be a whole number of scales, as both formats have it: that of symmetric schemes
is. Embedding and head are written as floats, since most readers take no other.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .... import quantization
from ....core.errors import fail
from ....layers import Weight
from ....quantization import packing
from ...families.tables import Json
from . import codes

SYMMETRIC = (
    "Quantize symmetrically: fa.quantize(fa.int4(symmetric=True)), or fa.gptq(model, tokens, "
    "fa.int4(symmetric=True)); without format= this library's own layout has every record."
)
ANY = "Without format= this library's own layout has every record."


class Module(NamedTuple):
    """The tensors of one matrix by the end of their names, and the scheme that they share."""

    tensors: Mapping[str, Tensor]
    scheme: Mapping[str, Json]


def flatten_as(
    method: str, tensors: Mapping[str, Weight], floats: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """The tensors of a file, and its quantization_config ({} where nothing is quantized).

    Args:
        method: "compressed-tensors" or "gptq".
        tensors: name -> tensor or record.
        floats: names of what is written as floats, and the dtype. A tied head among them is not in
            `tensors`, and still a module of other readers.

    Raises:
        TypeError: a record that the method does not have.
        ValueError: zero points, scales or groups that it does not have.
    """
    make, describe = METHODS[method]
    flat: dict[str, Tensor] = {}
    schemes: dict[str, Mapping[str, Json]] = {}
    plain = [name.removesuffix(".weight") for name in floats if name not in tensors]
    for name, leaf in tensors.items():
        module = name.removesuffix(".weight")
        if isinstance(leaf, Tensor) or name in floats:
            whole = leaf if isinstance(leaf, Tensor) else quantization.expand(leaf)
            flat[name] = whole if whole is leaf else whole.to(floats[name])
            plain += [module] if whole.dim() == 2 else []
            continue
        made = make(name, leaf)
        flat |= {f"{module}.{end}": tensor for end, tensor in made.tensors.items()}
        schemes[module] = made.scheme
    settings = describe(schemes, plain) if schemes else {}
    if settings.get("checkpoint_format") == "gptq":
        lower = lambda name, x: x - codes.ONES[settings["bits"]] if _is_zeros(name) else x
        flat = {name: lower(name, x) for name, x in flat.items()}
    return flat, settings


def _is_zeros(name: str) -> bool:
    return name.endswith(".qzeros")


def _refuse(name: str, wanted: str, got: object, remedy: str, kind: type = ValueError) -> NoReturn:
    fail("save", name, wanted, got, remedy, kind)


def _points(name: str, weight: Any) -> Tensor:
    """The zero points (N, G), whole numbers 0 to 15 with zero = -points scale, exactly."""
    scale, zero = weight.scale.double(), weight.zero.double()
    points = torch.where(scale == 0, 8, (-zero / scale).round())
    if not torch.equal(points * scale, -zero) or points.min() < 0 or points.max() > 15:
        _refuse(name, "of zero points that are 0 to 15 scales", "others", SYMMETRIC)
    return points.to(torch.uint8)


def words(each: Tensor, bits: int) -> Tensor:
    """Codes (N, K) uint8 as words (N, K bits / 32), rounded up: the inverse of `codes.unpacked`."""
    padded = F.pad(each, (0, -each.shape[-1] % (32 // bits)))
    bytes_ = padded if bits == 8 else codes.paired(padded)
    return bytes_.flatten().view(torch.int32).unflatten(0, (len(each), -1))


def _numbers(weight: Any) -> Tensor:
    """The codes (N, K) uint8 of 4 bits, or of 8 with 128 for zero."""
    if weight.codes.dtype == torch.int8:
        return weight.codes.view(torch.uint8) ^ 128
    return packing.unpack(weight.codes, weight.scale.shape[-1], 4)


def _strategy(K: int, G: int) -> dict[str, Json]:
    grouped = {"strategy": "group", "group_size": K // G}
    return grouped if G > 1 else {"strategy": "channel", "group_size": None}


# compressed-tensors.


def _compressed(name: str, weight: Weight) -> Module:
    (N, K), G = weight.shape[-2:], weight.scale.shape[-1]
    if isinstance(weight, (quantization.Int4, quantization.Int8)):
        bits = 4 if isinstance(weight, quantization.Int4) else 8
        if K % (32 // bits):
            _refuse(name, f"of a multiple of {32 // bits} columns", (N, K), ANY)
        tensors = {
            "weight_packed": words(_numbers(weight), bits),
            "weight_scale": weight.scale,
            "weight_shape": torch.tensor([N, K]),
        }
        points = _points(name, weight) if bits == 4 else torch.tensor(128)
        symmetric = bool((points == 2 ** (bits - 1)).all())
        if not symmetric:
            tensors["weight_zero_point"] = words(points.mT, 4).mT.contiguous()
        args = {"num_bits": bits, "type": "int", "symmetric": symmetric, **_strategy(K, G)}
        return Module(tensors, {"format": "pack-quantized", "weights": args})
    if isinstance(weight, quantization.Int8Dynamic) and G == 1:
        args = {"num_bits": 8, "type": "int", "symmetric": True, **_strategy(K, 1)}
        token = {**args, "strategy": "token", "dynamic": True}
        scheme = {"format": "int-quantized", "weights": args, "input_activations": token}
        return Module({"weight": weight.codes, "weight_scale": weight.scale}, scheme)
    if (
        isinstance(weight, quantization.Fp8)
        and weight.codes.dtype == torch.float8_e4m3fn
        and G == 1
    ):
        args = {"num_bits": 8, "type": "float", "symmetric": True, **_strategy(K, 1)}
        scheme = {"format": "float-quantized", "weights": args}
        return Module({"weight": weight.codes, "weight_scale": weight.scale}, scheme)
    wanted = "Int4, Int8, Int8Dynamic by rows (fa.w8a8(group=None)) or Fp8 in e4m3 by rows"
    _refuse(name, wanted, f"a {type(weight).__name__} with {G} groups", ANY, TypeError)


def _compressed_settings(
    schemes: Mapping[str, Mapping[str, Json]], plain: list[str]
) -> dict[str, Json]:
    kinds: list[Mapping[str, Json]] = []
    for scheme in schemes.values():
        if scheme not in kinds:
            kinds.append(scheme)
    groups = {}
    for number, kind in enumerate(kinds):
        own = [module for module, scheme in schemes.items() if scheme == kind]
        weights = {**kind["weights"], "dynamic": False}
        targets = ["Linear"] if len(kinds) == 1 else own
        filled = {"input_activations": None, "output_activations": None, **kind}
        groups[f"group_{number}"] = {**filled, "weights": weights, "targets": targets}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds[0]["format"] if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
        "kv_cache_scheme": None,
    }


# GPTQ.


def _gptq(name: str, weight: Weight) -> Module:
    kinds = (quantization.Int4, quantization.OrderedInt4, quantization.Int8)
    if not isinstance(weight, kinds):
        _refuse(name, "Int4, OrderedInt4 or Int8", f"a {type(weight).__name__}", ANY, TypeError)
    bits = 8 if isinstance(weight, quantization.Int8) else 4
    (N, K), G = weight.shape[-2:], weight.scale.shape[-1]
    if N % (32 // bits) or K % (32 // bits):
        _refuse(name, f"of multiples of {32 // bits}", (N, K), ANY)
    scale = weight.scale.half()
    if not torch.equal(scale.double(), weight.scale.double()):
        remedy = 'Write format="compressed-tensors", which keeps their dtype.'
        _refuse(name, "of scales that float16 has", weight.scale.dtype, remedy)
    each = _numbers(weight)
    points = torch.full((N, G), 128, dtype=torch.uint8) if bits == 8 else _points(name, weight)
    group = torch.arange(K, dtype=torch.int32) // (K // G)
    if isinstance(weight, quantization.OrderedInt4):
        place = weight.order.argsort()
        each, group = each[:, place], group[place]
    tensors = {
        "qweight": words(each, bits).mT.contiguous(),
        "qzeros": words(points.mT.contiguous(), bits),
        "scales": scale.mT.contiguous(),
        "g_idx": group,
    }
    scheme = {
        "bits": bits,
        "group_size": K // G if G > 1 else -1,
        "desc_act": isinstance(weight, quantization.OrderedInt4),
        "sym": bool((points == 2 ** (bits - 1)).all()),
        "zero": bool((points == 0).any()),
    }
    return Module(tensors, scheme)


def _gptq_settings(schemes: Mapping[str, Mapping[str, Json]], plain: list[str]) -> dict[str, Json]:
    sizes = {(scheme["bits"], scheme["group_size"]) for scheme in schemes.values()}
    if len(sizes) > 1:
        remedy = 'Write format="compressed-tensors", which has a scheme for each matrix.'
        _refuse("params", "of one number of bits and one group", sorted(sizes), remedy)
    bits, size = next(iter(sizes))
    left_out = [module for module in plain if ".layers." in f".{module}"]
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": any(scheme["desc_act"] for scheme in schemes.values()),
        "sym": all(scheme["sym"] for scheme in schemes.values()),
        # less one, no zero point is below 0
        "checkpoint_format": "gptq_v2"
        if any(kind["zero"] for kind in schemes.values())
        else "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        **({"dynamic": {f"-:^{_escaped(name)}$": {} for name in left_out}} if left_out else {}),
    }


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


METHODS: Mapping[str, tuple[Callable[..., Module], Callable[..., dict[str, Json]]]] = {
    "compressed-tensors": (_compressed, _compressed_settings),
    "gptq": (_gptq, _gptq_settings),
}
