"""Laguna: a gate of attention for each head, windows that turn whole heads, sigmoid experts."""

from collections.abc import Mapping

from ...transformer import Config
from .conventions import TENSORS, read_activation, read_sizes, read_windows, write_windows
from .llama import write_common
from .llama_variants import LAYER
from .mixture_variants import (
    EXPERTS,
    layers_with,
    shared_names,
    sparse_layers,
    write_sparse_layers,
)
from .positions import parse_rope, partial_heads, with_rope_type, write_rope
from .tables import Family, Fields, Json, refuse

ROPE = {
    "full_attention": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
}
GATES = {True: "head", "per-head": "head", "per-element": "width"}


def read_two_parts(
    fields: Fields, sizes: dict[str, Json], windowed: bool, default: Mapping[str, Json]
) -> dict[str, Json]:
    """The angles, of a part of each head, of layers without a window and of those with one.

    `default`: the objects of both kinds where the file has none.
    """
    place, rope = fields.place("rope_parameters"), fields.get("rope_parameters", default)
    if not isinstance(rope, dict) or not rope.keys() <= ROPE.keys():
        refuse(place, "an object of full_attention and sliding_attention", rope)
    found = []
    for kind in ROPE:
        one = rope.get(kind)
        if not isinstance(one, dict) or "rope_theta" not in one:
            refuse(f"{kind} of {place}", "an object with a rope_theta", one)
        read = parse_rope(with_rope_type(one), place, sizes["context"], {})
        scaling = read["rope_scaling"]
        found.append(
            {**partial_heads({**read, "rope_scaling": None}, sizes["head_size"]), "x": scaling}
        )
    wide, near = found
    if near.pop("x") is not None:
        refuse(f"sliding_attention of {place}", "rope_type default", rope["sliding_attention"])
    return {
        "rope_base": wide["rope_base"],
        "rope_scaling": wide["x"],
        "rotary_size": wide["rotary_size"],
        "local_rope_base": near["rope_base"] if windowed else None,
        "local_rotary_size": (near["rotary_size"] or sizes["head_size"]) if windowed else None,
    }


def _read_laguna(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=131072, kv_heads=8, head_size=128)
    layers, heads = sizes["layers"], sizes["heads"]
    each = fields.items("num_attention_heads_per_layer") or [heads] * layers
    if each != [heads] * layers:
        place = fields.place("num_attention_heads_per_layer")
        refuse(place, f"{heads} for each of the {layers} layers", each)
    windows = read_windows(fields, fields.whole("sliding_window", 512), layers, [False] * layers)
    gate = fields.get("gating", True)
    if gate is not True and not (isinstance(gate, str) and gate in GATES):
        refuse(fields.place("gating"), "true, per-head or per-element", gate)
    chosen = sparse_layers(fields, layers, [i > 0 for i in range(layers)])
    biased = fields.flag("attention_bias", False)
    return {
        **sizes,
        **windows,
        **read_two_parts(fields, sizes, windows["window"] is not None, ROPE),
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings", False),
        "qkv_bias": biased,
        "output_bias": biased,
        "head_norm": "rms",
        "attention_gate": GATES[gate],
        "gate_activation": "softplus",
        **layers_with(chosen, fields.whole("num_experts", 256)),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": fields.whole("moe_intermediate_size", 512),
        "router_scores": "sigmoid",
        "choice_bias": True,
        "routing_scale": fields.positive("moe_routed_scaling_factor", 1.0),
        "shared_size": fields.whole("shared_expert_intermediate_size", 512),
    }


def write_two_parts(config: Config) -> dict[str, object]:
    """The same, written."""
    share = lambda size: {"partial_rotary_factor": (size or config.head_size) / config.head_size}
    full = {**write_rope(config, nested=True), **share(config.rotary_size)}
    near = {"rope_type": "default", "rope_theta": config.local_rope_base or 1e4}
    near |= share(config.local_rotary_size)
    return {"rope_parameters": {"full_attention": full, "sliding_attention": near}}


def _write_laguna(config: Config) -> dict[str, object]:
    common = write_common(config)
    for name in ("rope_scaling", "rope_theta", "partial_rotary_factor"):
        common.pop(name, None)
    windows = write_windows(config)
    if config.window is None:  # a window that no layer has
        windows["sliding_window"] = config.context
    return {
        **common,
        **windows,
        **write_two_parts(config),
        "gating": "per-element" if config.attention_gate == "width" else "per-head",
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "moe_routed_scaling_factor": config.routing_scale,
        "shared_expert_intermediate_size": config.shared_size,
        "mlp_layer_types": write_sparse_layers(config),
    }


LAGUNA = Family(
    "laguna",
    "LagunaForCausalLM",
    _read_laguna,
    _write_laguna,
    {
        **TENSORS,
        **shared_names("mlp.shared_expert"),
        "layers.{}.attention_gate": LAYER + "self_attn.g_proj.weight",
        "layers.{}.router": LAYER + "mlp.gate.weight",
        "layers.{}.choice_bias": LAYER + "mlp.experts.e_score_correction_bias",
    },
    packs=EXPERTS,
    neutral={
        "moe_apply_router_weight_on_input": (False,),
        "moe_router_logit_softcapping": (0.0, 0),
    },
)
