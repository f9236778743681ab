"""Kimi Linear: delta nets that forget feature by feature (KDA), latent attention without positions
in every fourth layer, and the experts of DeepSeek-V3.

Gates and rates of a net are of low rank. Published files name the dense layer and the experts
otherwise than transformers writes them: `Family.older`.
"""

import torch

from ...transformer import Config
from .conventions import TENSORS
from .latent_layouts import ATTENTION, NAMES, keys_and_values, low_rank
from .latent_variants import read_latent, write_latent
from .layouts import placed, stacked
from .llama_variants import LAYER
from .mixture_variants import (
    ROUTER,
    aliased,
    layers_with,
    shared_names,
    sparse_layers,
    write_sparse_layers,
)
from .sigmoid_mixtures import CHOICE, dense_first, read_groups
from .tables import Family, Fields, Json, Pack, refuse

KINDS = {"full_attention": "attention", "linear_attention": "gated_delta"}
NET = {
    "mixer_beta": "b_proj.weight",
    "mixer_rate_down": "f_a_proj.weight",
    "mixer_rate": "f_b_proj.weight",
    "rate_bias": "dt_bias",
    "mixer_gate_down": "g_a_proj.weight",
    "mixer_gate": "g_b_proj.weight",
    "mixer_norm": "o_norm.weight",
    "mixer_out": "o_proj.weight",
}
SIDES = ("q", "k", "v")


def _joined(path: str, kind: str, *, squeeze: bool = False) -> Pack:
    """A leaf whose rows of queries, keys and values are a tensor each."""
    fit = lambda x: x.squeeze(1) if squeeze else x
    back = lambda x: x.unsqueeze(1) if squeeze else x
    return Pack(
        (path,),
        tuple(f"{ATTENTION}{side}_{kind}.weight" for side in SIDES),
        lambda config, x: [torch.cat([fit(part) for part in x])],
        lambda config, x: [back(part).contiguous() for part in x[0].chunk(3)],
    )


def _log_rate() -> Pack:
    fit = lambda config, x: [x[0].flatten()]
    back = lambda config, x: [x[0].reshape(1, 1, -1, 1)]
    return Pack(("layers.{}.log_rate",), (ATTENTION + "A_log",), fit, back)


def _kinds(fields: Fields, layers: int, net: dict[str, Json]) -> tuple[str, ...]:
    """The mixers, by layer_types or by the numbers (from 1) in the object of the published file."""
    kinds = fields.items("layer_types")
    full, kda = (net.get(name) for name in ("full_attn_layers", "kda_layers"))
    if not kinds and isinstance(full, list) and isinstance(kda, list):
        place = "linear_attn_config in config.json"
        if sorted([*full, *kda]) != list(range(1, layers + 1)):
            refuse(place, f"each of the {layers} layers once, from 1", [full, kda])
        kinds = ["full_attention" if i + 1 in full else "linear_attention" for i in range(layers)]
    kinds = kinds or [
        "full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(layers)
    ]
    if len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        wanted = f"{' or '.join(KINDS)} for each of the {layers} layers"
        refuse(fields.place("layer_types"), wanted, kinds)
    return tuple(KINDS[kind] for kind in kinds)


def _read_kimi(fields: Fields) -> dict[str, Json]:
    given = {name: x for name, x in fields.values.items() if name != "head_dim"}  # not read
    net = given.pop("linear_attn_config", {})
    if not isinstance(net, dict):
        refuse("linear_attn_config in config.json", "an object", net)
    names = {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    given |= {theirs: net[name] for name, theirs in names.items() if name in net}
    for name, alias in (
        ("max_position_embeddings", "model_max_length"),
        ("n_group", "num_expert_group"),
        ("norm_topk_prob", "moe_renormalize"),
    ):
        if alias in given:
            given.setdefault(name, given[alias])
            fields.get(alias)
    fields.values = given
    found = read_latent(fields, context=1048576, query_latent=None, epsilon=1e-5)
    layers, size = found["layers"], fields.whole("moe_intermediate_size", 1024)
    heads = fields.whole("linear_num_heads", 32)
    features = fields.whole("linear_head_dim", 128)
    chosen = sparse_layers(fields, layers, dense_first(fields, layers, 1))
    fields.values.setdefault("routed_scaling_factor", 2.446)
    return {
        **found,
        "positions": "none",
        "rope_base": 10000.0,
        "rope_scaling": None,
        "mixers": _kinds(fields, layers, net),
        "convolution_size": fields.whole("linear_conv_kernel_dim", 4),
        "state_heads": heads,
        "state_key_heads": heads,
        "state_key_size": features,
        "state_value_size": features,
        "mixer_rank": features,
        "feature_decay": True,
        "mixer_gate_activation": "sigmoid",
        **layers_with(chosen, aliased(fields, "num_local_experts", "num_experts", 256)),
        "experts_per_token": aliased(fields, "num_experts_per_tok", "num_experts_per_token", 8),
        "expert_size": size,
        "normalized_routing": fields.flag("norm_topk_prob", True),
        **read_groups(fields),
        "shared_size": size * aliased(fields, "n_shared_experts", "num_shared_experts", 1),
    }


def _write_kimi(config: Config) -> dict[str, object]:
    common = write_latent(config)
    for name in ("rope_scaling", "rope_theta", "rope_parameters", "max_position_embeddings"):
        common.pop(name, None)
    theirs = {ours: name for name, ours in KINDS.items()}
    return {
        **common,
        "model_max_length": config.context,
        "layer_types": [theirs.get(kind, kind) for kind in config.mixers],
        "linear_num_heads": config.state_heads,
        "linear_head_dim": config.state_key_size,
        "linear_conv_kernel_dim": config.convolution_size,
        "mlp_layer_types": write_sparse_layers(config),
        "num_experts": config.experts,
        "num_experts_per_token": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "moe_renormalize": config.normalized_routing,
        "num_expert_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "routed_scaling_factor": config.routing_scale,
        "num_shared_experts": config.shared_size // max(config.expert_size, 1),
    }


def _is_net(config: Config, layer: int) -> bool:
    return config.layer_spec(layer).recurs


KIMI_LINEAR = Family(
    "kimi_linear",
    "KimiLinearForCausalLM",
    _read_kimi,
    _write_kimi,
    {
        **TENSORS,
        **NAMES,
        **ROUTER,
        **CHOICE,
        **shared_names("mlp.shared_experts"),
        **{f"layers.{{}}.{leaf}": ATTENTION + name for leaf, name in NET.items()},
    },
    packs=(
        _joined("layers.{}.mixer_in", "proj"),
        _joined("layers.{}.convolution", "conv1d", squeeze=True),
        _log_rate(),
        keys_and_values(ATTENTION + "kv_b_proj.weight"),
        placed("layers.{}.q", ATTENTION + "q_b_proj.weight", low_rank),
        *(
            stacked(f"layers.{{}}.{leaf}", f"{LAYER}mlp.experts.{{expert}}.{name}.weight")
            for leaf, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        ),
    ),
    neutral={
        "mla_use_nope": (True,),
        "moe_router_activation_func": ("sigmoid",),
        "use_grouped_topk": (True,),
        "moe_layer_freq": (1,),
    },
    older={"block_sparse_moe": "mlp"},
)
