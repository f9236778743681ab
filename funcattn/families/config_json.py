"""config.json, as Hugging Face writes it, to Config and back."""

from collections.abc import Mapping
from typing import Any

from ..layers import RopeScaling
from ..transformer import Config
from .catalogue import family_of
from .llama import LLAMA
from .tables import check_neutral, configure, listed, positive, refuse, scaling, whole

ACTIVATIONS = {  # config.json -> layers.ACTIVATIONS
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(values: Mapping[str, Any]) -> Config:
    """The Config that a config.json describes; raises CheckpointError for what Config cannot express.

    Example:
        >>> sizes = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
        >>> read_config({"model_type": "llama", **sizes, "attention_bias": True})
        Traceback (most recent call last):
        funcattn.families.tables.CheckpointError: load: attention_bias in config.json should be False or absent, got True. ...
    """
    family = family_of(values.get("model_type"), "model_type in config.json")
    architectures = values.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        refuse("architectures in config.json", [family.architecture], architectures)
    check_neutral(values, family.neutral, "{} in config.json")
    if any(kind != "full_attention" for kind in listed(values.get("layer_types"), "layer_types in config.json")):
        refuse("layer_types in config.json", "full_attention throughout", values["layer_types"])

    values = {**family.defaults, **{name: value for name, value in values.items() if value is not None}}
    heads = whole(values.get("num_attention_heads"), "num_attention_heads in config.json")
    width = whole(values.get("hidden_size"), "hidden_size in config.json")
    values = {"num_key_value_heads": heads, "head_dim": width // heads, **values}
    activation = values["hidden_act"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        refuse("hidden_act in config.json", f"one of {', '.join(ACTIVATIONS)}", activation)
    if not isinstance(values["tie_word_embeddings"], bool):
        refuse("tie_word_embeddings in config.json", "true or false", values["tie_word_embeddings"])
    base, stretched = _read_rope(values)
    return configure(
        **{ours: whole(values.get(theirs), f"{theirs} in config.json") for ours, theirs in family.sizes.items()},
        activation=ACTIVATIONS[activation],
        norm_epsilon=positive(values["rms_norm_eps"], "rms_norm_eps in config.json"),
        rope_base=base,
        rope_scaling=stretched,
        tied=values["tie_word_embeddings"],
    )


def write_config(config: Config) -> dict[str, Any]:
    """The config.json of a Config, its rotary fields for old and new readers.

    Law: read_config(write_config(config)) == config (test_families.py::test_a_config_comes_back_from_its_json).
    """
    family = LLAMA
    stretched = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": stretched.kind if stretched else "default"}
    if stretched:
        values = (stretched.factor, stretched.low, stretched.high, stretched.context)
        rope |= dict(zip(KINDS[stretched.kind], values, strict=False))  # linear has the first alone
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{theirs: getattr(config, ours) for ours, theirs in family.sizes.items()},
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {**rope, "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "rope_scaling": rope if stretched else None,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _read_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    field = "rope_parameters" if "rope_parameters" in values else "rope_scaling"
    rope, where = values.get(field, {}), f"{field} in config.json"
    if not isinstance(rope, dict):
        refuse(where, "an object", rope)
    rope = {"rope_type" if name == "type" else name: value for name, value in rope.items()}
    old = values.get("rope_scaling", {})
    if not isinstance(old, dict) or any(rope.get("rope_type" if name == "type" else name) != value for name, value in old.items()):
        refuse("rope_scaling in config.json", "absent beside rope_parameters, or the same", old)
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in KINDS:
        refuse(f"rope_type of {where}", f"one of {', '.join(KINDS)}", kind)
    check_neutral(rope, {"partial_rotary_factor": (1, 1.0)}, f"{{}} of {where}")
    known = {"rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", *KINDS[kind]}
    for name in rope.keys() - known:
        refuse(f"{name} of {where}", f"absent where rope_type is {kind}", rope[name])
    base = positive(rope.get("rope_theta", values.get("rope_theta", 10000.0)), "rope_theta in config.json")
    numbers = [positive(rope.get(name), f"{name} of {where}") for name in KINDS[kind]]
    return base, scaling(kind, *numbers)
