"""Mixtures of experts whose scores are sigmoids, with a bias for the choice of experts.

glm4_moe dots1 solar_open    after DeepSeek-V3: experts in groups, one that every token takes
exaone_moe hy_v3             the same behind norms of heads
minimax_m2                   the router alone
"""

import re
from dataclasses import replace

from ...transformer import Config
from .conventions import (
    TENSORS,
    read_activation,
    read_sizes,
    read_windows,
    turning_where_local,
    write_windows,
)
from .llama import write_common
from .llama_variants import LAYER, read_variant, window_of
from .mixture_variants import (
    EXPERTS,
    SHARED,
    layers_with,
    shared_names,
    sparse_layers,
    write_experts,
    write_sparse_layers,
)
from .mixtures import MIXTRAL
from .positions import partial_heads, read_rope, write_rope
from .tables import Family, Fields, Json, refuse

CHOICE = {"layers.{}.choice_bias": LAYER + "mlp.gate.e_score_correction_bias"}


def but_layers(*numbers: int) -> re.Pattern[str]:
    """What of a file is not read: what follows from the config, and layers behind the last, which
    predict a second token in published models with so many layers.
    """
    behind = "|".join(map(str, numbers))
    return re.compile(rf"model\.layers\.(({behind})\..+|\d+\.self_attn\.rotary_emb\.inv_freq)")


def read_groups(fields: Fields) -> dict[str, Json]:
    """The router of DeepSeek-V3."""
    return {
        "router_scores": "sigmoid",
        "choice_bias": True,
        "expert_groups": fields.whole("n_group", 1),
        "groups_per_token": fields.whole("topk_group", 1),
        "routing_scale": fields.positive("routed_scaling_factor", 1.0),
    }


def write_groups(config: Config, experts: str, shared: str) -> dict[str, object]:
    """The same, written; names of the numbers of experts differ."""
    dense = [i for i in range(config.layers) if not config.layer_spec(i).experts]
    return {
        **write_experts(config),
        experts: config.experts,
        shared: config.shared_size // max(config.expert_size, 1),
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "routed_scaling_factor": config.routing_scale,
        "moe_intermediate_size": config.expert_size,
        "first_k_dense_replace": len(dense),
    }


def dense_first(fields: Fields, layers: int, default: int) -> list[bool]:
    """Which layers have experts: all but the first few, `default` where the file says nothing."""
    first = fields.get("first_k_dense_replace", default)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        refuse(fields.place("first_k_dense_replace"), "a number of layers", first)
    return [i >= first for i in range(layers)]


def _read_glm4_moe(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=131072, kv_heads=8)
    size = fields.whole("moe_intermediate_size", 1408)
    return {
        **sizes,
        **partial_heads(read_rope(fields, sizes["context"], share=0.5), sizes["head_size"]),
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-5),
        "tied": fields.flag("tie_word_embeddings", False),
        "qkv_bias": fields.flag("attention_bias", False),
        "head_norm": "rms" if fields.flag("use_qk_norm", False) else "none",
        **layers_with(
            dense_first(fields, sizes["layers"], 1), fields.whole("n_routed_experts", 128)
        ),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": size,
        "normalized_routing": fields.flag("norm_topk_prob", True),
        **read_groups(fields),
        "shared_size": size * fields.whole("n_shared_experts", 1),
    }


def _write_glm4_moe(config: Config) -> dict[str, object]:
    rope = write_rope(config)
    share = rope["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return {
        **write_common(config),
        **rope,
        "partial_rotary_factor": share,
        **write_groups(config, "n_routed_experts", "n_shared_experts"),
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.head_norm == "rms",
    }


def _read_dots1(fields: Fields) -> dict[str, Json]:
    kv_heads = None if fields.says("num_key_value_heads") else 32
    common = read_variant(fields, context=2048, kv_heads=kv_heads)
    layers, size = common["layers"], fields.whole("moe_intermediate_size", 1408)
    window, first = window_of(fields, 4096), fields.get("max_window_layers", 62)
    local = [window is not None and i >= first for i in range(layers)]
    return {
        **common,
        **read_windows(fields, window, layers, local),
        "head_norm": "rms",
        **layers_with(dense_first(fields, layers, 0), fields.whole("n_routed_experts")),
        "experts_per_token": fields.whole("num_experts_per_tok"),
        "expert_size": size,
        "normalized_routing": fields.flag("norm_topk_prob", False),
        **read_groups(fields),
        "shared_size": size * fields.whole("n_shared_experts"),
    }


def _write_dots1(config: Config) -> dict[str, object]:
    windows = {**write_windows(config), "max_window_layers": config.layers}
    return {
        **write_common(config),
        **windows,
        **write_groups(config, "n_routed_experts", "n_shared_experts"),
    }


def _read_solar(fields: Fields) -> dict[str, Json]:
    fields.values = {"intermediate_size": 1, **fields.values}  # no layer is dense
    common = read_variant(fields, context=131072, base=1e6, epsilon=1e-5, kv_heads=8, head_size=128)
    size = fields.whole("moe_intermediate_size", 1280)
    return {
        **common,
        "feed_forward": size,
        "output_bias": False,
        "experts": fields.whole("n_routed_experts", 128),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": size,
        "normalized_routing": fields.flag("norm_topk_prob", True),
        **read_groups(fields),
        "shared_size": size * fields.whole("n_shared_experts", 1),
    }


def _write_solar(config: Config) -> dict[str, object]:
    common = write_common(config)
    del common["intermediate_size"]
    return {
        **common,
        **write_groups(config, "n_routed_experts", "n_shared_experts"),
        "attention_bias": config.qkv_bias,
        "first_k_dense_replace": None,
    }


def _read_exaone_moe(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=2048, epsilon=1e-5, kv_heads=32, bias=False)
    layers, window = common["layers"], window_of(fields, 4096)
    every = fields.get("sliding_window_pattern", 4)
    if not fields.items("layer_types"):
        every = fields.whole("sliding_window_pattern", 4)
        local = [window is not None and (i + 1) % every != 0 for i in range(layers)]
    else:
        local = []
    windows = read_windows(fields, window, layers, local)
    dense = dense_first(fields, layers, 1)
    size = fields.whole("moe_intermediate_size", 1024)
    return {
        **common,
        **windows,
        "rotary_layers": turning_where_local(windows, layers) if window is not None else (),
        "head_norm": "rms",
        **layers_with(sparse_layers(fields, layers, dense), fields.whole("num_experts", 64)),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": size,
        "normalized_routing": fields.flag("norm_topk_prob", True),
        **read_groups(fields),
        "routing_scale": fields.positive("routed_scaling_factor", 2.5),
        "shared_size": size * fields.whole("num_shared_experts", 1),
    }


def _write_exaone_moe(config: Config) -> dict[str, object]:
    windows = write_windows(config)
    if config.window is None and config.rotary_layers:  # a window that no layer has
        windows["sliding_window"] = config.context
    return {
        **write_common(config),
        **windows,
        "sliding_window_pattern": 4,
        **write_groups(config, "num_experts", "num_shared_experts"),
        "mlp_layer_types": write_sparse_layers(config),
    }


def _read_hy_v3(fields: Fields) -> dict[str, Json]:
    common = read_variant(
        fields, context=131072, base=11158840.0, epsilon=1e-5, kv_heads=8, head_size=128
    )
    layers, size = common["layers"], fields.whole("moe_intermediate_size", 1536)
    chosen = sparse_layers(fields, layers, [i > 0 for i in range(layers)])
    if fields.flag("mlp_bias", False):
        refuse(fields.place("mlp_bias"), False, True)
    fields.flag("enable_moe_fp32_combine", True)  # a precision
    return {
        **common,
        "head_norm": "rms",
        **layers_with(chosen, fields.whole("num_experts", 192)),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": size,
        "router_scores": "sigmoid",
        "choice_bias": True,
        "routing_scale": fields.positive("router_scaling_factor", 2.826),
        "shared_size": size * fields.whole("num_shared_experts", 1),
    }


def _write_hy_v3(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        **write_experts(config),
        "moe_intermediate_size": config.expert_size,
        "num_shared_experts": config.shared_size // max(config.expert_size, 1),
        "router_scaling_factor": config.routing_scale,
        "mlp_layer_types": write_sparse_layers(config),
    }


def _read_minimax_m2(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=196608, kv_heads=8, head_size=128)
    if fields.get("rotary_dim") is not None:  # of the released files
        share = fields.whole("rotary_dim") / sizes["head_size"]
        fields.values = {"partial_rotary_factor": share, **fields.values}
    rope = read_rope(fields, sizes["context"], base=5e6)
    return {
        **sizes,
        **partial_heads(rope, sizes["head_size"]),
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings", False),
        "head_norm": "rms_width",
        "experts": fields.whole("num_local_experts", 256),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": sizes["feed_forward"],
        "router_scores": "sigmoid",
        "choice_bias": True,
    }


def _write_minimax_m2(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }


GLM4_MOE, DOTS1, SOLAR_OPEN = (
    Family(name, architecture, read, write, {**SHARED, **CHOICE}, packs=EXPERTS)
    for name, architecture, read, write in (
        ("glm4_moe", "Glm4MoeForCausalLM", _read_glm4_moe, _write_glm4_moe),
        ("dots1", "Dots1ForCausalLM", _read_dots1, _write_dots1),
        ("solar_open", "SolarOpenForCausalLM", _read_solar, _write_solar),
    )
)
GLM4_MOE = replace(GLM4_MOE, harmless=but_layers(46, 92))  # GLM-4.5-Air and GLM-4.5
EXAONE_MOE = Family(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    _read_exaone_moe,
    _write_exaone_moe,
    {**SHARED, "layers.{}.choice_bias": LAYER + "mlp.e_score_correction_bias"},
    packs=EXPERTS,
)
HY_V3 = Family(
    "hy_v3",
    "HYV3ForCausalLM",
    _read_hy_v3,
    _write_hy_v3,
    {
        **TENSORS,
        **shared_names("mlp.shared_mlp"),
        "layers.{}.router": LAYER + "mlp.router.gate.weight",
        "layers.{}.choice_bias": LAYER + "mlp.expert_bias",
    },
    packs=EXPERTS,
)
MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    _read_minimax_m2,
    _write_minimax_m2,
    {
        **MIXTRAL.tensors,
        "layers.{}.choice_bias": LAYER + "block_sparse_moe.e_score_correction_bias",
    },
    packs=MIXTRAL.packs,
)
