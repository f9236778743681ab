"""Families whose attention has a gate, or whose activation has weights.

afmoe                   a sigmoid of each feature; layers without a window do not turn
apertus apertus1p5_text xIELU, an activation with two weights a layer
"""

import torch
from torch import Tensor

from ...layers.activations import XIELU_LIMIT, XIELU_SLOPE
from ...transformer import Config
from .conventions import TENSORS, read_windows, turning_where_local, write_windows
from .llama import write_common
from .llama_variants import LAYER, read_variant
from .mixture_variants import EXPERTS, layers_with, shared_names
from .tables import Family, Fields, Json, Pack, refuse


def _read_afmoe(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=16384, epsilon=1e-5, head_size=128)
    layers, size = common["layers"], fields.whole("moe_intermediate_size", 1408)
    every, first = fields.whole("global_attn_every_n_layers", 4), fields.get("num_dense_layers", 1)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        refuse(fields.place("num_dense_layers"), "a number of layers", first)
    local = [bool((i + 1) % every) for i in range(layers)]
    windows = read_windows(fields, fields.whole("sliding_window", 1024), layers, local)
    return {
        **common,
        **windows,
        "rotary_layers": turning_where_local(windows, layers),
        "norm_placement": "around",
        "head_norm": "rms",
        "attention_gate": "width",
        "embedding_scale": common["width"] ** 0.5 if fields.flag("mup_enabled", False) else 1.0,
        **layers_with([i >= first for i in range(layers)], fields.whole("num_experts", 64)),
        "experts_per_token": fields.whole("num_experts_per_tok", 6),
        "expert_size": size,
        "router_scores": "sigmoid",
        "choice_bias": True,
        "routing_scale": fields.positive("route_scale", 1.0),
        "shared_size": size * fields.whole("num_shared_experts", 2),
    }


def _write_afmoe(config: Config) -> dict[str, object]:
    windows = write_windows(config)
    if config.window is None:  # a window that no layer has
        windows["sliding_window"] = config.context
    return {
        **write_common(config),
        **windows,
        "num_dense_layers": sum(not config.layer_spec(i).experts for i in range(config.layers)),
        "mup_enabled": config.embedding_scale != 1.0,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "route_scale": config.routing_scale,
        "num_shared_experts": config.shared_size // max(config.expert_size, 1),
    }


APERTUS_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def _read_apertus(fields: Fields) -> dict[str, Json]:
    if fields.get("rope_parameters") is None and fields.get("rope_scaling") is None:
        fields.values["rope_parameters"] = APERTUS_ROPE
    act = fields.get("hidden_act", "xielu")
    if act == "xielu":
        fields.values["hidden_act"] = "silu"
    found = read_variant(fields, context=65536, base=12e6, epsilon=1e-5)
    more = {"head_norm": "rms", "gated": False}
    return {**found, **more, **({"activation": "xielu"} if act == "xielu" else {})}


def _write_apertus(config: Config) -> dict[str, object]:
    found = write_common(config)
    return {**found, "hidden_act": "xielu"} if config.activation == "xielu" else found


def _read_apertus_text(fields: Fields) -> dict[str, Json]:
    found = _read_apertus(fields)
    size = fields.whole("output_vocab_size", found["vocabulary"])
    if size != found["vocabulary"]:
        place = fields.place("output_vocab_size")
        refuse(place, f"absent, or vocab_size = {found['vocabulary']}", size)
    return found


def _unpack_xielu(config: Config, tensors: list[Tensor]) -> list[Tensor]:
    a, b, slope, limit = tensors
    near = torch.isclose(limit.float(), torch.tensor(XIELU_LIMIT), rtol=1e-2, atol=0.0)
    if slope.device.type != "meta" and not (bool(slope == XIELU_SLOPE) and bool(near)):
        refuse("beta and eps of xIELU", (XIELU_SLOPE, XIELU_LIMIT), (float(slope), float(limit)))
    return [torch.cat([a, b])]


def _pack_xielu(config: Config, leaves: list[Tensor]) -> list[Tensor]:
    a, b = leaves[0].split(1)
    constant = lambda value: torch.full((), value, dtype=a.dtype, device=a.device)
    return [a, b, constant(XIELU_SLOPE), constant(XIELU_LIMIT)]


AFMOE = Family(
    "afmoe",
    "AfmoeForCausalLM",
    _read_afmoe,
    _write_afmoe,
    {
        **TENSORS,
        "layers.{}.attention_gate": LAYER + "self_attn.gate_proj.weight",
        "layers.{}.attention_after_norm": LAYER + "post_attention_layernorm.weight",
        "layers.{}.feed_forward_norm": LAYER + "pre_mlp_layernorm.weight",
        "layers.{}.feed_forward_after_norm": LAYER + "post_mlp_layernorm.weight",
        "layers.{}.router": LAYER + "mlp.router.gate.weight",
        "layers.{}.choice_bias": LAYER + "mlp.expert_bias",
        **shared_names("mlp.shared_experts"),
    },
    packs=EXPERTS,
)
APERTUS, APERTUS_TEXT = (
    Family(
        name,
        architecture,
        read,
        _write_apertus,
        {
            **TENSORS,
            "layers.{}.attention_norm": LAYER + "attention_layernorm.weight",
            "layers.{}.feed_forward_norm": LAYER + "feedforward_layernorm.weight",
        },
        packs=(
            Pack(
                ("layers.{}.activation_weights",),
                tuple(LAYER + f"mlp.act_fn.{x}" for x in ("alpha_p", "alpha_n", "beta", "eps")),
                _unpack_xielu,
                _pack_xielu,
            ),
        ),
    )
    for name, architecture, read in (
        ("apertus", "ApertusForCausalLM", _read_apertus),
        ("apertus1p5_text", "Apertus1p5TextForCausalLM", _read_apertus_text),
    )
)
