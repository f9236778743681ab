"""MiMo-V2-Flash: layers with a window have twice the key heads, and sinks; values smaller than
keys, times a factor; sigmoid experts in groups.
"""

from ...transformer import Config
from .conventions import TENSORS, read_activation, read_sizes, read_windows, write_windows
from .laguna import read_two_parts, write_two_parts
from .llama import write_common
from .llama_variants import LAYER
from .mixture_variants import EXPERTS, ROUTER, layers_with, sparse_layers, write_sparse_layers
from .sigmoid_mixtures import CHOICE, read_groups, write_groups
from .tables import Family, Fields, Json

ROPE = {
    "full_attention": {"rope_theta": 5e6, "partial_rotary_factor": 0.334},
    "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.334},
}


def _read_mimo(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=131072, kv_heads=4, head_size=192)
    layers, kv_heads = sizes["layers"], sizes["kv_heads"]
    window = fields.whole("sliding_window", 129)
    if fields.get("sliding_window_size") is not None:  # tokens before each
        window = fields.whole("sliding_window_size") + 1
    near = [i > 0 and (i + 1) % 6 != 0 for i in range(layers)]
    windows = read_windows(fields, window, layers, near)
    windowed = windows["window"] is not None
    if fields.get("routed_scaling_factor") is None:
        fields.values["routed_scaling_factor"] = 1.0
    default = None if fields.says("attention_value_scale") else 0.707
    factor = fields.positive("attention_value_scale", default)
    value_size = fields.whole("v_head_dim", 128)
    return {
        **sizes,
        **windows,
        **read_two_parts(fields, sizes, windowed, ROPE),
        "value_size": None if value_size == sizes["head_size"] else value_size,
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-5),
        "tied": fields.flag("tie_word_embeddings", False),
        "qkv_bias": fields.flag("attention_bias", False),
        # values are only summed: their factor is that of the sum
        "attention_factors": () if factor in (None, 1.0) else (1.0, 1.0, factor),
        "local_kv_heads": 2 * kv_heads if windowed else None,
        "sinks": windowed,
        "local_sinks": windowed,
        **layers_with(
            sparse_layers(fields, layers, [i > 0 for i in range(layers)]),
            fields.whole("n_routed_experts", 256),
        ),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": fields.whole("moe_intermediate_size", 2048),
        "normalized_routing": fields.flag("norm_topk_prob", True),
        **read_groups(fields),
    }


def _write_mimo(config: Config) -> dict[str, object]:
    groups = write_groups(config, "n_routed_experts", "n_shared_experts")
    for name in ("n_shared_experts", "first_k_dense_replace", "num_experts"):
        groups.pop(name, None)
    common = {**write_common(config), **write_windows(config)}
    for name in ("rope_scaling", "rope_theta", "partial_rotary_factor"):
        common.pop(name, None)
    if config.window is None:
        common["sliding_window"] = config.context
    return {
        **common,
        **groups,
        **write_two_parts(config),
        "attention_bias": config.qkv_bias,
        "v_head_dim": config.head_sizes[1],
        "attention_value_scale": config.attention_factors[2] if config.attention_factors else None,
        "mlp_layer_types": write_sparse_layers(config),
    }


MIMO = Family(
    "mimo_v2_flash",
    "MiMoV2FlashForCausalLM",
    _read_mimo,
    _write_mimo,
    {
        **TENSORS,
        **ROUTER,
        **CHOICE,
        "layers.{}.sinks": LAYER + "self_attn.attention_sink_bias",
    },
    packs=EXPERTS,
)
