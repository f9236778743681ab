"""Families with the multipliers of Granite, which is beside Llama.

granite_swa    sinks, and windows with a rotary base a layer
hyperclovax    norms around
"""

from collections.abc import Sequence

from ...transformer import Config
from .conventions import TENSORS, read_windows, write_windows
from .llama import LLAMA, read_multipliers, write_multipliers
from .llama_variants import LAYER, read_variant, window_of
from .tables import Family, Fields, Json, refuse


def read_thetas(fields: Fields, common: dict[str, Json], local: Sequence[bool]) -> dict[str, Json]:
    """layer_rope_theta of Granite: a rotary base a layer, 0 where it does not turn.

    Args:
        fields: of config.json.
        common: what was read, with rope_base and rope_scaling.
        local: which layers have a window.
    """
    layers, place = common["layers"], fields.place("layer_rope_theta")
    thetas = fields.items("layer_rope_theta") or [common["rope_base"]] * layers
    numbers = all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1e30 for x in thetas
    )
    if len(thetas) != layers or not numbers:
        refuse(place, f"a number for each of the {layers} layers", thetas)
    near, wide = (
        {float(x) for x, is_local in zip(thetas, local, strict=True) if x and is_local == kind}
        for kind in (True, False)
    )
    if len(near) > 1 or len(wide) > 1 or (near != wide and near and common["rope_scaling"]):
        refuse(place, "one base in layers with a window and one in the others, not scaled", thetas)
    base = max(wide or near, default=common["rope_base"])
    return {
        "rope_base": base,
        "local_rope_base": None if not near or near == {base} else max(near),
        "rotary_layers": () if all(thetas) else tuple(bool(x) for x in thetas),
    }


def write_thetas(config: Config) -> list[float]:
    """layer_rope_theta."""
    specs = [config.layer_spec(i) for i in range(config.layers)]
    base = lambda spec: config.local_rope_base if spec.local else config.rope_base
    return [base(spec) or 0.0 if spec.rotary else 0.0 for spec in specs]


def granite_windows(fields: Fields, common: dict[str, Json]) -> dict[str, Json]:
    """Windows in three of four layers, a rotary base for each, and sinks."""
    layers = common["layers"]
    windows = read_windows(
        fields, window_of(fields, 128), layers, [bool(i % 4) for i in range(layers)]
    )
    local = windows["window_layers"] or (windows["window"] is not None,) * layers
    return {**windows, **read_thetas(fields, common, local), "sinks": True}


def write_granite_windows(config: Config) -> dict[str, object]:
    """The same, written."""
    return {**write_windows(config), "layer_rope_theta": write_thetas(config)}


def _read_granite_swa(fields: Fields) -> dict[str, Json]:
    common = read_variant(
        fields, context=8192, epsilon=1e-5, tied=True, kv_heads=4, feed_forward_bias=True
    )
    return {**common, **read_multipliers(fields), **granite_windows(fields, common)}


def _write_granite_swa(config: Config) -> dict[str, object]:
    return {
        **LLAMA.write(config),
        **write_multipliers(config),
        **write_granite_windows(config),
    }


def _read_hyperclovax(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=2048, feed_forward_bias=True)
    multipliers = read_multipliers(fields)
    multipliers["logit_scale"] = fields.positive("logits_scaling", 1.0)  # here they multiply
    if fields.get("attention_multiplier") is None:
        multipliers["attention_scale"] = common["head_size"] ** -0.5
    return {
        **common,
        **multipliers,
        "norm_placement": "around" if fields.flag("use_post_norm", True) else "before",
    }


def _write_hyperclovax(config: Config) -> dict[str, object]:
    return {
        **LLAMA.write(config),
        **write_multipliers(config),
        "logits_scaling": config.logit_scale,
        "use_post_norm": config.norm_placement == "around",
    }


GRANITE_SWA = Family(
    "granite_swa", "GraniteSWAForCausalLM", _read_granite_swa, _write_granite_swa, TENSORS
)
HYPERCLOVAX = Family(
    "hyperclovax",
    "HyperCLOVAXForCausalLM",
    _read_hyperclovax,
    _write_hyperclovax,
    {
        **TENSORS,
        "layers.{}.attention_after_norm": LAYER + "post_norm1.weight",
        "layers.{}.feed_forward_after_norm": LAYER + "post_norm2.weight",
    },
)
