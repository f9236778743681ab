"""Rotary fields of config.json to Config and back, in the names of transformers 5 and earlier."""

import math
from collections.abc import Mapping

from ...layers import RopeScaling
from ...transformer import Config
from .tables import Fields, Json, check_neutral, positive, refuse, whole

ORIGINAL = "original_max_position_embeddings"
NEEDED = {  # kind -> required fields, which are numbers
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": (),
    "proportional": (),
}
OPTIONAL = {  # kind -> optional fields
    "llama3": {ORIGINAL},
    "yarn": {
        "factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        ORIGINAL,
    },
    "proportional": {"factor"},  # of a part of each head
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", ORIGINAL},
}
# Fields that no class of transformers here reads.
UNREAD = {"finetuned", "attn_factor", "short_mscale", "long_mscale", "type"}
UNREAD |= {"mrope_section", "mrope_interleaved"}  # equal positions on all axes
KNOWN = {"rope_type", "rope_theta", "partial_rotary_factor", *UNREAD}.union(
    *NEEDED.values(), *OPTIONAL.values()
)


def read_rope(
    fields: Fields,
    context: int,
    *,
    base: float = 10000.0,
    share: float | None = None,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    renamed: Mapping[str, str] | None = None,
    original: int | None = None,
) -> dict[str, Json]:
    """rope_base, rope_scaling and "partial", the fraction of a head that is rotated (or None).

    Args:
        fields: of config.json, with `rope_parameters` (transformers 5) or `rope_theta` and
            `rope_scaling` (earlier).
        context: positions of the model, for scalings that depend on it.
        base, share: defaults.
        names: names of base and fraction outside of the object; values in the object take
            precedence.
        renamed: the family's names of scalings -> ours.
        original: the family's original_max_position_embeddings, if any, which takes precedence over
            that in the object.
    """
    rope, where = rope_object(fields, "rope_parameters"), "rope_parameters in config.json"
    old = rope_object(fields, "rope_scaling")
    if old and rope and any(rope.get(key) != value for key, value in old.items()):
        refuse("rope_scaling in config.json", "absent beside rope_parameters, or the same", old)
    if old:  # as in transformers
        rope, where = old, "rope_scaling in config.json"
    beside = fields.get(ORIGINAL, original)
    outer = {
        "rope_theta": fields.get(names[0], base),
        "partial_rotary_factor": fields.get(names[1], share),
    }
    rope = {**outer, **rope, ORIGINAL: rope.get(ORIGINAL) if beside is None else beside}
    return parse_rope(with_rope_type(rope), where, context, renamed or {})


def rope_object(fields: Fields, name: str) -> dict[str, Json]:
    """An object of rotary fields, without null, its kind as "rope_type"; empty where absent."""
    rope = fields.get(name, {})
    if not isinstance(rope, dict):
        refuse(fields.place(name), "an object", rope)
    return with_rope_type(rope)


def with_rope_type(rope: Mapping[str, object]) -> dict[str, Json]:
    """Rotary fields without null, their kind as "rope_type", which precedes the older "type"."""
    rope = {key: value for key, value in rope.items() if value is not None}
    return {"rope_type": rope["type"], **rope} if "type" in rope else rope


def parse_rope(
    rope: Mapping[str, object],
    where: str,
    context: int,
    renamed: Mapping[str, str],
    *,
    proportional: bool = False,
) -> dict[str, Json]:
    """`read_rope` of one object; fields unused by its kind are ignored, unknown ones an error.

    `proportional` is True for a family whose files have that kind.
    """
    kind = rope.get("rope_type", "default")
    kind = renamed.get(kind, kind) if isinstance(kind, str) else kind
    known = [name for name in NEEDED if proportional or name != "proportional"]
    if not isinstance(kind, str) or kind not in known:
        refuse(f"rope_type of {where}", f"one of {', '.join(known)}", rope.get("rope_type"))
    for name in rope.keys() - KNOWN:
        refuse(
            f"{name} of {where}", "absent, since no kind of scaling is known to have it", rope[name]
        )
    base = positive(rope.get("rope_theta", 10000.0), f"rope_theta of {where}")
    partial = (
        positive(rope["partial_rotary_factor"], f"partial_rotary_factor of {where}")
        if "partial_rotary_factor" in rope
        else None
    )
    if kind == "proportional":  # of all pairs so many turn, those of a whole head
        factor = positive(rope.get("factor", 1.0), f"factor of {where}")
        scaling = RopeScaling("proportional", factor, share=1.0 if partial is None else partial)
        return {"rope_base": base, "rope_scaling": scaling, "partial": None}
    numbers = [positive(rope.get(name), f"{name} of {where}") for name in NEEDED[kind]]
    return {
        "rope_base": base,
        "rope_scaling": _scaling(kind, numbers, rope, where, context),
        "partial": partial,
    }


def _scaling(
    kind: str, numbers: list[float], rope: Mapping[str, object], where: str, context: int
) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", numbers[0])
    if kind == "dynamic":
        return RopeScaling("dynamic", numbers[0], context=context)
    original = whole(rope.get(ORIGINAL, context), f"{ORIGINAL} of {where}")
    if kind == "llama3":
        factor, low, high = numbers
        if not low < high:
            refuse(
                "high_freq_factor of llama3 rope scaling", f"above low_freq_factor = {low}", high
            )
        return RopeScaling("llama3", factor, low, high, original)
    number = lambda name, default: positive(rope.get(name, default), f"{name} of {where}")
    factor = number("factor", context / original)
    if kind == "longrope":
        told = rope.get("attention_factor") is not None
        if factor > 1 and original == 1 and not told:
            refuse(f"attention_factor of {where}", f"given where {ORIGINAL} is 1", None)
        default = (
            1.0 if told or factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        )
        short, long = (
            _factors(rope.get(name), f"{name} of {where}")
            for name in ("short_factor", "long_factor")
        )
        if len(short) != len(long):
            refuse(f"long_factor of {where}", f"as long as short_factor, {len(short)}", len(long))
        attention = number("attention_factor", default)
        return RopeScaling(
            "longrope", context=original, attention=attention, short=short, long=long
        )
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        refuse(f"truncate of {where}", "true or false", truncate)
    stretch = lambda by: 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0
    by, over = rope.get("mscale"), rope.get("mscale_all_dim")
    default = stretch(1.0)
    if by and over:
        default = stretch(positive(by, f"mscale of {where}")) / stretch(
            positive(over, f"mscale_all_dim of {where}")
        )
    turns = {
        name: positive(rope.get(name) or usual, f"{name} of {where}")
        for name, usual in (("beta_fast", 32), ("beta_slow", 1))
    }
    return RopeScaling(
        "yarn",
        factor,
        context=original,
        fast=turns["beta_fast"],
        slow=turns["beta_slow"],
        truncate=truncate,
        attention=number("attention_factor", default),
    )


def _factors(value: object, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        refuse(where, "a list of numbers", value)
    return tuple(positive(number, where) for number in value)


def whole_heads(rope: dict[str, Json]) -> dict[str, Json]:
    """Rotary fields of a family that rotates whole heads.

    It does not read a fraction, but its scalings do, for heads that none has.
    """
    if rope["rope_scaling"] is not None:
        check_neutral(
            {"partial_rotary_factor": rope["partial"]},
            {"partial_rotary_factor": (1.0,)},
            "{} in config.json",
        )
    return {name: value for name, value in rope.items() if name != "partial"}


def partial_heads(rope: dict[str, Json], head_size: int) -> dict[str, Json]:
    """Rotary fields of a family that rotates a fraction of each head."""
    turning = head_size if rope["partial"] is None else int(head_size * rope["partial"])
    if not 0 < turning <= head_size or turning % 2:
        refuse(
            "partial_rotary_factor in config.json",
            f"such that an even number of {head_size} features turns",
            turning,
        )
    return {
        **whole_heads({**rope, "partial": None}),
        "rotary_size": None if turning == head_size else turning,
    }


def read_two_bases(
    fields: Fields,
    context: int,
    bases: tuple[Json, Json],
    windowed: bool,
    *,
    proportional: bool = False,
) -> dict[str, Json]:
    """One base for layers without a window, another for those with, in either format.

    `bases` are those where the objects say nothing.
    """
    nested, where, kinds = (
        fields.get("rope_parameters", {}),
        "rope_parameters in config.json",
        ("full_attention", "sliding_attention"),
    )
    if not isinstance(nested, dict) or not nested.keys() <= set(kinds):
        refuse(where, "an object of full_attention and sliding_attention", nested)
    if not all(isinstance(part, dict | None) for part in nested.values()):
        refuse(where, "an object of objects", nested)
    scaling = fields.get("rope_scaling", {})
    if not isinstance(scaling, dict):
        refuse("rope_scaling in config.json", "an object", scaling)
    full, near = (nested.get(kind) or {"rope_type": "default"} for kind in kinds)
    full = {**full, **scaling}  # whose "type" says nothing beside the "rope_type" that is there
    wide, narrow = (
        # read of the outer object
        parse_rope(
            with_rope_type({"rope_theta": base, **part, "truncate": True}),
            where,
            context,
            {},
            proportional=proportional,
        )
        for base, part in zip(bases, (full, near), strict=True)
    )
    if narrow["rope_scaling"] is not None:
        refuse(f"sliding_attention of {where}", "rope_type default", near)
    return {
        **whole_heads(wide),
        "local_rope_base": whole_heads(narrow)["rope_base"] if windowed else None,
    }


def write_two_bases(config: Config) -> dict[str, Json]:
    """The same, written."""
    near = {"rope_type": "default", "rope_theta": config.local_rope_base or 1e4}
    full = write_rope(config, nested=True)
    return {"rope_parameters": {"full_attention": full, "sliding_attention": near}}


def write_rope(config: Config, *, nested: bool = False) -> dict[str, Json]:
    """The rotary fields of a Config, for newer and older readers (if `nested`, newer only)."""
    scaling = config.rope_scaling
    rope: dict[str, Json] = {"rope_type": "default"} if scaling is None else _write_scaling(scaling)
    share = (
        {}
        if config.rotary_size is None
        else {"partial_rotary_factor": config.rotary_size / config.head_size}
    )
    parameters = {**rope, "rope_theta": config.rope_base, **share}
    if nested:
        return parameters
    return {
        "rope_parameters": parameters,
        "rope_theta": config.rope_base,
        "rope_scaling": rope if scaling else None,
        **share,
    }


def _write_scaling(scaling: RopeScaling) -> dict[str, object]:
    kind, factor = scaling.kind, scaling.factor
    if kind in ("linear", "dynamic"):
        return {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        bounds = {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        return {"rope_type": kind, "factor": factor, **bounds, ORIGINAL: scaling.context}
    if kind == "proportional":
        stretched = {} if factor == 1.0 else {"factor": factor}
        return {"rope_type": kind, "partial_rotary_factor": scaling.share, **stretched}
    common = {"rope_type": kind, "attention_factor": scaling.attention, ORIGINAL: scaling.context}
    if kind == "longrope":
        return {**common, "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    ramp = {"beta_fast": scaling.fast, "beta_slow": scaling.slow, "truncate": scaling.truncate}
    return {**common, "factor": factor, **ramp}
