"""The rotary fields of a config.json to Config and back, in the spelling of transformers 5 and in the one before."""

import math
from collections.abc import Mapping
from typing import Any

from ..layers import RopeScaling
from ..transformer import Config
from .tables import Fields, check_neutral, positive, refuse, whole

ORIGINAL = "original_max_position_embeddings"
NUMBERS = {  # kind -> its fields that must be numbers
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": (),
}
OTHERS = {  # kind -> fields that it may have besides
    "llama3": {ORIGINAL},
    "yarn": {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", ORIGINAL},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", ORIGINAL},
}


def read_rope(fields: Fields, context: int, *, base: float = 10000.0, renamed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """rope_base, rope_scaling and, under "partial", the share of a head that turns (None where nothing is said).

    Args:
        fields: of config.json, with `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
        context: positions that the model has, for scalings that follow from it.
        base: where nothing is said.
        renamed: kinds of scaling that this family calls otherwise.
    """
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    rope, where = fields.get(name, {}), f"{name} in config.json"
    if not isinstance(rope, dict):
        refuse(where, "an object", rope)
    rope = {("rope_type" if key == "type" else key): value for key, value in rope.items() if value is not None}
    old = fields.get("rope_scaling", {})
    if not isinstance(old, dict) or any(rope.get("rope_type" if key == "type" else key) != value for key, value in old.items()):
        refuse("rope_scaling in config.json", "absent beside rope_parameters, or the same", old)
    rope = {"rope_theta": fields.get("rope_theta", base), ORIGINAL: fields.get(ORIGINAL), **rope}
    return parse_rope({key: value for key, value in rope.items() if value is not None}, where, context, renamed or {})


def parse_rope(rope: Mapping[str, Any], where: str, context: int, renamed: Mapping[str, str]) -> dict[str, Any]:
    """The same of one object of rotary fields."""
    kind = rope.get("rope_type", "default")
    kind = renamed.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in NUMBERS:
        refuse(f"rope_type of {where}", f"one of {', '.join(NUMBERS)}", rope.get("rope_type"))
    known = {"rope_type", "rope_theta", "partial_rotary_factor", ORIGINAL, *NUMBERS[kind], *OTHERS.get(kind, ())}
    for name in rope.keys() - known:
        refuse(f"{name} of {where}", f"absent where rope_type is {kind}", rope[name])
    base = positive(rope.get("rope_theta", 10000.0), f"rope_theta of {where}")
    partial = (
        positive(rope["partial_rotary_factor"], f"partial_rotary_factor of {where}") if "partial_rotary_factor" in rope else None
    )
    numbers = [positive(rope.get(name), f"{name} of {where}") for name in NUMBERS[kind]]
    return {"rope_base": base, "rope_scaling": _scaling(kind, numbers, rope, where, context), "partial": partial}


def _scaling(kind: str, numbers: list[float], rope: Mapping[str, Any], where: str, context: int) -> RopeScaling | None:
    original = whole(rope.get(ORIGINAL, context), f"{ORIGINAL} of {where}")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", numbers[0])
    if kind == "dynamic":
        return RopeScaling("dynamic", numbers[0], context=context)
    if kind == "llama3":
        factor, low, high = numbers
        if not low < high:
            refuse("high_freq_factor of llama3 rope scaling", f"above low_freq_factor = {low}", high)
        return RopeScaling("llama3", factor, low, high, original)
    number = lambda name, default: positive(rope.get(name, default), f"{name} of {where}")
    factor = number("factor", context / original)
    if kind == "longrope":
        told = rope.get("attention_factor") is not None
        if factor > 1 and original == 1 and not told:
            refuse(f"attention_factor of {where}", f"given where {ORIGINAL} is 1", None)
        default = 1.0 if told or factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = (_factors(rope.get(name), f"{name} of {where}") for name in ("short_factor", "long_factor"))
        if len(short) != len(long):
            refuse(f"long_factor of {where}", f"as long as short_factor, {len(short)}", len(long))
        attention = number("attention_factor", default)
        return RopeScaling("longrope", context=original, attention=attention, short=short, long=long)
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        refuse(f"truncate of {where}", "true or false", truncate)
    stretch = lambda by: 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0
    by, over = rope.get("mscale"), rope.get("mscale_all_dim")
    default = stretch(1.0)
    if by and over:
        default = stretch(positive(by, f"mscale of {where}")) / stretch(positive(over, f"mscale_all_dim of {where}"))
    return RopeScaling(
        "yarn",
        factor,
        context=original,
        fast=number("beta_fast", 32.0),
        slow=number("beta_slow", 1.0),
        truncate=truncate,
        attention=number("attention_factor", default),
    )


def _factors(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        refuse(where, "a list of numbers", value)
    return tuple(positive(number, where) for number in value)


def whole_heads(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary fields of a family whose heads turn whole; anything else is refused by name."""
    check_neutral({"partial_rotary_factor": rope["partial"]}, {"partial_rotary_factor": (1.0,)}, "{} in config.json")
    return {name: value for name, value in rope.items() if name != "partial"}


def partial_heads(rope: dict[str, Any], share: float, head_size: int) -> dict[str, Any]:
    """Rotary fields of a family that turns a share of each head, `share` where the object does not say."""
    turning = int(head_size * (share if rope["partial"] is None else rope["partial"]))
    if not 0 < turning <= head_size or turning % 2:
        refuse("partial_rotary_factor in config.json", f"such that an even number of {head_size} features turns", turning)
    return {**whole_heads({**rope, "partial": None}), "rotary_size": None if turning == head_size else turning}


def write_rope(config: Config, *, nested: bool = False) -> dict[str, Any]:
    """The rotary fields of a Config, for new readers and for old ones (`nested` are not written for old ones)."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"} if scaling is None else _write_scaling(scaling)
    share = {} if config.rotary_size is None else {"partial_rotary_factor": config.rotary_size / config.head_size}
    parameters = {**rope, "rope_theta": config.rope_base, **share}
    if nested:
        return parameters
    return {"rope_parameters": parameters, "rope_theta": config.rope_base, "rope_scaling": rope if scaling else None, **share}


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    kind, factor = scaling.kind, scaling.factor
    if kind in ("linear", "dynamic"):
        return {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        bounds = {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        return {"rope_type": kind, "factor": factor, **bounds, ORIGINAL: scaling.context}
    common = {"rope_type": kind, "attention_factor": scaling.attention, ORIGINAL: scaling.context}
    if kind == "longrope":
        return {**common, "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    ramp = {"beta_fast": scaling.fast, "beta_slow": scaling.slow, "truncate": scaling.truncate}
    return {**common, "factor": factor, **ramp}
