"""Families with layers of Mamba-2.

bamba         attention in a few layers, half of whose heads turn
falcon_h1     attention beside Mamba-2 in each layer; a factor for each projection

Granite's are beside its mixtures, Nemotron's in `nemotron_hybrids`.
"""

import math

from ...transformer import Config
from .conventions import TENSORS
from .layouts import fused, squeezed
from .llama import read_common, write_common
from .llama_variants import LAYER
from .positions import partial_heads, read_rope
from .tables import Family, Fields, Json, Pack, positive, refuse

HEADS = {  # Config -> config.json, and the default
    "state_heads": ("mamba_n_heads", 128),
    "state_key_heads": ("mamba_n_groups", 1),
    "state_key_size": ("mamba_d_state", 256),
    "convolution_size": ("mamba_d_conv", 4),
}
KINDS = {  # config.json -> MIXERS
    "full_attention": "attention",
    "attention": "attention",
    "linear_attention": "state_space",
    "mamba": "state_space",
}
THEIRS = {"attention": "full_attention", "state_space": "linear_attention"}


def mamba_names(prefix: str) -> dict[str, str]:
    """Path -> name on disk of a layer of Mamba-2, but for what `mamba_packs` reads."""
    names = {
        "mixer_out": "out_proj.weight",
        "mixer_out_bias": "out_proj.bias",
        "convolution_bias": "conv1d.bias",
        "log_rate": "A_log",
        "mixer_skip": "D",
        "rate_bias": "dt_bias",
        "mixer_norm": "norm.weight",
    }
    return {f"layers.{{}}.{leaf}": prefix + name for leaf, name in names.items()}


def mamba_packs(prefix: str) -> tuple[Pack, ...]:
    """Gate, what is convolved and rate one under the other; and the convolution."""

    def sizes(config: Config) -> list[int]:
        inner = config.state_heads * config.state_value_size
        keys = config.state_key_heads * config.state_key_size
        return [inner, inner + 2 * keys, config.state_heads]

    leaves = [f"layers.{{}}.mixer_{leaf}" for leaf in ("gate", "in", "rate")]
    return (
        fused(leaves, prefix + "in_proj.weight", sizes),
        fused([f"{leaf}_bias" for leaf in leaves], prefix + "in_proj.bias", sizes),
        squeezed("layers.{}.convolution", prefix + "conv1d.weight"),
    )


def read_heads(fields: Fields, width: int, own: int | None = None) -> dict[str, Json]:
    """The sizes of the state spaces, where they are called as in Bamba.

    `own`: all their features, where they do not follow from the width.
    """
    found = {ours: fields.whole(name, usual) for ours, (name, usual) in HEADS.items()}
    heads, expand = found["state_heads"], fields.whole("mamba_expand", 2)
    inner = expand * width if own is None else own
    if fields.get("mamba_d_head", "auto") == "auto":
        fields.values["mamba_d_head"] = inner // heads
    size = fields.whole("mamba_d_head")
    if size * heads != inner:
        wanted = f"{inner} / mamba_n_heads = {inner / heads}"
        refuse(fields.place("mamba_d_head"), wanted, size)
    bias = fields.flag("mamba_proj_bias", False)
    return {
        **found,
        "state_value_size": size,
        "convolution_bias": fields.flag("mamba_conv_bias", True),
        "mixer_bias": bias,
        "mixer_output_bias": bias,
        "step_limit": _read_limit(fields),
    }


def write_heads(config: Config) -> dict[str, object]:
    """The same, written."""
    return {
        **{name: getattr(config, ours) for ours, (name, _) in HEADS.items()},
        "mamba_d_head": config.state_value_size,
        "mamba_expand": max(config.state_heads * config.state_value_size // config.width, 1),
        "mamba_conv_bias": config.convolution_bias,
        "mamba_proj_bias": config.mixer_bias,
        "time_step_limit": [_written(x) for x in config.step_limit],
    }


def _read_limit(fields: Fields) -> tuple[float, float]:
    given = fields.items("time_step_limit") or [0.0, math.inf]
    where = fields.place("time_step_limit")
    if len(given) != 2:
        refuse(where, "the least and the greatest step", given)
    spelled = {"__float__": "Infinity"}
    low, high = (math.inf if x in (spelled, math.inf) else x for x in given)
    return (
        0.0 if low == 0 and not isinstance(low, bool) else positive(low, where),
        high if high == math.inf else positive(high, where),
    )


def _written(x: float) -> object:
    """A number as JSON has it: transformers spells infinity so."""
    return {"__float__": "Infinity"} if x == math.inf else x


def read_mixers(fields: Fields, layers: int) -> dict[str, Json]:
    """Kinds and sizes of a family that names the kind of each layer; nothing where all attend."""
    kinds = fields.items("layer_types") or fields.items("layers_block_type")
    if len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        wanted = f"{' or '.join(THEIRS.values())} for each of the {layers} layers"
        refuse(fields.place("layer_types"), wanted, kinds)
    mixers = tuple(KINDS[kind] for kind in kinds)
    if "attention" not in mixers:
        refuse(fields.place("layer_types"), "full_attention in a layer", kinds)
    if "state_space" not in mixers:
        return {}
    return {"mixers": mixers, **read_heads(fields, fields.whole("hidden_size"))}


def write_mixers(config: Config) -> dict[str, object]:
    """The same, written; without state spaces, sizes that agree for none."""
    mixers = config.mixers or ("attention",) * config.layers
    none = {"mamba_n_heads": 1, "mamba_expand": 1, "mamba_d_head": config.width}
    heads = write_heads(config) if config.state_heads else none
    return {"layer_types": [THEIRS.get(mixer, mixer) for mixer in mixers], **heads}


PLACES = {  # of Bamba and Falcon-H1
    **TENSORS,
    "norm": "model.final_layernorm.weight",
    "layers.{}.feed_forward_norm": LAYER + "pre_ff_layernorm.weight",
    **{
        f"layers.{{}}.{leaf}{ours}": LAYER + f"feed_forward.{leaf}_proj.{theirs}"
        for leaf in ("gate", "up", "down")
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
    },
    **mamba_names(LAYER + "mamba."),
}
UNREAD = ("num_logits_to_keep", "z_loss_coefficient", "mamba_chunk_size")


def _read_both(fields: Fields, context: int, own: int | None = None) -> dict[str, Json]:
    for name in UNREAD:
        fields.get(name)
    kv_heads = None if fields.says("num_key_value_heads") else 8
    common = read_common(fields, context=context, epsilon=1e-5, kv_heads=kv_heads)
    if common["activation"] != "silu":
        refuse(fields.place("hidden_act"), "silu", fields.get("hidden_act"))
    return {
        **common,
        "feed_forward_bias": fields.flag("mlp_bias", False),
        **read_heads(fields, common["width"], own),
    }


def _write_both(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        "mlp_bias": config.feed_forward_bias,
        **write_heads(config),
    }


def _read_bamba(fields: Fields) -> dict[str, Json]:
    both = _read_both(fields, 262144)
    attends = fields.items("attn_layer_indices")
    if not attends or any(i not in range(both["layers"]) for i in attends):
        wanted = f"numbers of some of the {both['layers']} layers"
        refuse(fields.place("attn_layer_indices"), wanted, attends)
    rope = read_rope(fields, both["context"], share=0.5)
    kinds = ["attention" if i in attends else "state_space" for i in range(both["layers"])]
    return {**both, **partial_heads(rope, both["head_size"]), "mixers": tuple(kinds)}


def _write_bamba(config: Config) -> dict[str, object]:
    both = _write_both(config)
    attends = [i for i, mixer in enumerate(config.mixers) if mixer == "attention"]
    rope, share = both["rope_parameters"], (config.rotary_size or config.head_size)
    assert isinstance(rope, dict)
    rope = {**rope, "partial_rotary_factor": share / config.head_size}
    return {**both, "attn_layer_indices": attends, "rope_parameters": rope}


def _read_factors(fields: Fields, name: str, count: int) -> tuple[float, ...]:
    given = fields.items(name) or [1.0] * count
    if len(given) != count:
        refuse(fields.place(name), f"{count} numbers", given)
    return tuple(positive(x, fields.place(name)) for x in given)


def _all_or_none(factors: tuple[float, ...]) -> tuple[float, ...]:
    return () if all(x == 1.0 for x in factors) else factors


def _read_falcon_h1(fields: Fields) -> dict[str, Json]:
    usual = None if fields.says("mamba_d_ssm") else 1024
    both = _read_both(fields, 8192, fields.whole("mamba_d_ssm", usual))
    factor = lambda name: fields.positive(f"{name}_multiplier", 1.0)
    normed, before = (
        fields.flag("mamba_rms_norm", False),
        fields.flag("mamba_norm_before_gate", True),
    )
    mixer = factor("ssm_in"), *_read_factors(fields, "ssm_multipliers", 5), factor("ssm_out")
    attention = factor("attention_in"), factor("key"), factor("attention_out")
    return {
        **both,
        "mixers": ("state_space_and_attention",) * both["layers"],
        "mixer_norm": ("before_gate" if before else "gated") if normed else "none",
        "mixer_output_bias": fields.flag("projectors_bias", False),
        "embedding_scale": factor("embedding"),
        "logit_scale": factor("lm_head"),
        "mixer_factors": _all_or_none(mixer),
        "attention_factors": _all_or_none(attention),
        "feed_forward_factors": _all_or_none(_read_factors(fields, "mlp_multipliers", 2)),
    }


def _write_falcon_h1(config: Config) -> dict[str, object]:
    inward, *parts, outward = config.mixer_factors or (1.0,) * 7
    attention = config.attention_factors or (1.0,) * 3
    factors = {
        "ssm_in": inward,
        "ssm_out": outward,
        "embedding": config.embedding_scale,
        "lm_head": config.logit_scale,
        **dict(zip(("attention_in", "key", "attention_out"), attention, strict=True)),
    }
    return {
        **_write_both(config),
        "mamba_d_ssm": config.state_heads * config.state_value_size,
        "projectors_bias": config.mixer_output_bias,
        "mamba_rms_norm": config.mixer_norm != "none",
        "mamba_norm_before_gate": config.mixer_norm != "gated",
        **{f"{name}_multiplier": factor for name, factor in factors.items()},
        "ssm_multipliers": parts,
        "mlp_multipliers": list(config.feed_forward_factors or (1.0, 1.0)),
    }


BAMBA, FALCON_H1 = (
    Family(name, architecture, read, write, PLACES, packs=mamba_packs(LAYER + "mamba."))
    for name, architecture, read, write in (
        ("bamba", "BambaForCausalLM", _read_bamba, _write_bamba),
        ("falcon_h1", "FalconH1ForCausalLM", _read_falcon_h1, _write_falcon_h1),
    )
)
