"""Mixtures of experts beside Mixtral and Qwen3-MoE, with a softmax router.

flex_olmo olmoe mellum    no more than a table
qwen2_moe                 an expert that every token takes, behind a gate
ernie4_5_moe              one without; a bias for the choice of experts
"""

from collections.abc import Sequence

from ...transformer import Config
from .conventions import (
    TENSORS,
    read_activation,
    read_sizes,
    read_windows,
    write_windows,
)
from .layouts import reshaped, stacked
from .llama import AFTER, write_common
from .llama_variants import LAYER, NEIGHBOURS, read_variant, window_of
from .positions import read_two_bases, write_two_bases
from .tables import Family, Fields, Json, refuse

PARTS = ("gate", "up", "down")
EXPERTS = tuple(
    stacked(f"layers.{{}}.{leaf}", LAYER + f"mlp.experts.{{expert}}.{leaf}_proj.weight")
    for leaf in PARTS
)


def shared_names(name: str) -> dict[str, str]:
    """The tensors of a shared expert."""
    return {f"layers.{{}}.shared_{leaf}": LAYER + f"{name}.{leaf}_proj.weight" for leaf in PARTS}


ROUTER = {"layers.{}.router": LAYER + "mlp.gate.weight"}
SHARED = {**TENSORS, **ROUTER, **shared_names("mlp.shared_experts")}


def layers_with(chosen: Sequence[bool], experts: int) -> dict[str, Json]:
    """experts and expert_layers."""
    return {
        "experts": experts if any(chosen) else 0,
        "expert_layers": () if all(chosen) or not any(chosen) else tuple(chosen),
    }


def aliased(fields: Fields, name: str, alias: str, default: int) -> int:
    """A size that goes by two names."""
    other = fields.whole(alias, None)
    found = fields.whole(name, default if other is None else other)
    if other not in (None, found):
        refuse(fields.place(alias), f"absent, or what {name} is, {found}", other)
    return found


def sparse_layers(fields: Fields, layers: int, default: list[bool]) -> list[bool]:
    """Which layers have experts, by mlp_layer_types."""
    kinds = fields.items("mlp_layer_types")
    if kinds and (len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds)):
        place = fields.place("mlp_layer_types")
        refuse(place, f"dense or sparse for each of the {layers} layers", kinds)
    return [kind == "sparse" for kind in kinds] or default


def write_sparse_layers(config: Config) -> list[str]:
    """The same, written."""
    return ["sparse" if config.layer_spec(i).experts else "dense" for i in range(config.layers)]


def write_experts(config: Config) -> dict[str, object]:
    """How many experts there are and are taken, and whether their weights sum to one."""
    return {
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalized_routing,
    }


def _read_olmoe(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=4096, epsilon=1e-5)
    return {
        **common,
        "head_norm": "rms_width",
        "qkv_limit": fields.positive("clip_qkv", None),
        "experts": fields.whole("num_experts", 64),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": common["feed_forward"],
        "normalized_routing": fields.flag("norm_topk_prob", False),
    }


def _write_olmoe(config: Config) -> dict[str, object]:
    return {**write_common(config), **write_experts(config), "clip_qkv": config.qkv_limit}


def _read_flex_olmo(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=4096, base=5e5)
    return {
        **common,
        "norm_placement": "after",
        "head_norm": "rms_width",
        "experts": fields.whole("num_experts", 7),
        "experts_per_token": fields.whole("num_experts_per_tok", 5),
        "expert_size": common["feed_forward"],
        "normalized_routing": fields.flag("norm_topk_prob", False),
    }


def _write_flex_olmo(config: Config) -> dict[str, object]:
    return {**write_common(config), **write_experts(config)}


def _read_mellum(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=131072, kv_heads=4, head_size=128)
    layers, biased = sizes["layers"], fields.flag("attention_bias", False)
    windows = read_windows(fields, window_of(fields, 1024), layers, [False] * layers)
    nested = fields.get("rope_parameters", {})
    for kind in nested.values() if isinstance(nested, dict) else ():
        if isinstance(kind, dict) and kind.get("partial_rotary_factor", 1.0) != 1.0:
            place = "partial_rotary_factor of rope_parameters in config.json"
            refuse(place, "1.0, or absent", kind["partial_rotary_factor"])
    chosen = sparse_layers(fields, layers, [True] * layers)
    return {
        **sizes,
        **read_two_bases(fields, sizes["context"], (5e5, 1e4), windows["window"] is not None),
        **windows,
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings", False),
        "qkv_bias": biased,
        "output_bias": biased,
        "head_norm": "rms",
        **layers_with(chosen, aliased(fields, "num_local_experts", "num_experts", 64)),
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": fields.whole("moe_intermediate_size", 896),
        "normalized_routing": fields.flag("norm_topk_prob", True),
    }


def _write_mellum(config: Config) -> dict[str, object]:
    common = write_common(config)
    del common["rope_scaling"]
    return {
        **common,
        **write_experts(config),
        **write_two_bases(config),
        **write_windows(config),
        "moe_intermediate_size": config.expert_size,
        "mlp_layer_types": write_sparse_layers(config),
    }


def _read_qwen2_moe(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=32768, kv_heads=16, bias=False)
    layers, windowed = common["layers"], fields.flag("use_sliding_window", False)
    window = fields.whole("sliding_window", 4096) if windowed else None
    fields.get("sliding_window")
    first = fields.get("max_window_layers", 28)
    local = [windowed and i % 2 == 0 and i < first for i in range(layers)]
    every, dense = fields.whole("decoder_sparse_step", 1), fields.items("mlp_only_layers")
    chosen = [i not in dense and (i + 1) % every == 0 for i in range(layers)]
    return {
        **common,
        **read_windows(fields, window, layers, local),
        "qkv_bias": fields.flag("qkv_bias", True),
        **layers_with(chosen, fields.whole("num_experts", 60)),
        "experts_per_token": fields.whole("num_experts_per_tok", 4),
        "expert_size": fields.whole("moe_intermediate_size", 1408),
        "normalized_routing": fields.flag("norm_topk_prob", False),
        "shared_size": fields.whole("shared_expert_intermediate_size", 5632),
        "shared_gated": True,
    }


def _write_qwen2_moe(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        **write_experts(config),
        **write_windows(config),
        "use_sliding_window": config.window is not None,
        "qkv_bias": config.qkv_bias,
        "moe_intermediate_size": config.expert_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.layers) if not config.layer_spec(i).experts],
        "shared_expert_intermediate_size": config.shared_size,
    }


def _read_ernie_moe(fields: Fields) -> dict[str, Json]:
    biased = fields.flag("use_bias", False)
    kv_heads = None if fields.says("num_key_value_heads") else 4
    common = read_variant(
        fields, context=131072, base=5e5, epsilon=1e-5, tied=True, kv_heads=kv_heads, bias=False
    )
    layers, every = common["layers"], fields.whole("moe_layer_interval", 1)
    first, last = fields.get("moe_layer_start_index", 1), fields.get("moe_layer_end_index", -1)
    for name, value in (("moe_layer_start_index", first), ("moe_layer_end_index", last)):
        if not isinstance(value, int) or isinstance(value, bool):
            refuse(fields.place(name), "the number of a layer", value)
    last = layers - 1 if last == -1 else last
    chosen = [(i + 1) % every == 0 and first <= i <= last for i in range(layers)]
    size, shared = fields.whole("moe_intermediate_size", 1536), fields.get("moe_num_shared_experts")
    shared = 2 if shared is None else shared
    if shared != 0:
        shared = fields.whole("moe_num_shared_experts", 2)
    if biased:
        refuse(fields.place("use_bias"), False, True)
    return {
        **common,
        **layers_with(chosen, aliased(fields, "moe_num_experts", "num_experts", 64)),
        "experts_per_token": aliased(fields, "moe_k", "num_experts_per_tok", 6),
        "expert_size": size,
        "choice_bias": True,
        "shared_size": size * shared,
    }


def _write_ernie_moe(config: Config) -> dict[str, object]:
    numbers = [i for i in range(config.layers) if config.layer_spec(i).experts] or [0]
    return {
        **write_common(config),
        "moe_num_experts": config.experts,
        "moe_k": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "moe_num_shared_experts": config.shared_size // max(config.expert_size, 1),
        "moe_layer_start_index": numbers[0],
        "moe_layer_end_index": numbers[-1],
        "moe_layer_interval": 1,
        "use_bias": config.feed_forward_bias,
    }


OLMOE = Family(
    "olmoe", "OlmoeForCausalLM", _read_olmoe, _write_olmoe, {**TENSORS, **ROUTER}, packs=EXPERTS
)
FLEX_OLMO = Family(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    _read_flex_olmo,
    _write_flex_olmo,
    {**TENSORS, **AFTER, **ROUTER},
    packs=EXPERTS,
)
MELLUM = Family(
    "mellum",
    "MellumForCausalLM",
    _read_mellum,
    _write_mellum,
    {**TENSORS, **ROUTER},
    packs=EXPERTS,
    neutral={"rope_scaling": ({},)},
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _read_qwen2_moe,
    _write_qwen2_moe,
    {
        **TENSORS,
        **ROUTER,
        **shared_names("mlp.shared_expert"),
        "layers.{}.shared_router": LAYER + "mlp.shared_expert_gate.weight",
    },
    packs=EXPERTS,
)
ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    _read_ernie_moe,
    _write_ernie_moe,
    SHARED,
    packs=(
        *NEIGHBOURS,
        *EXPERTS,
        reshaped(
            "layers.{}.choice_bias",
            LAYER + "mlp.moe_statics.e_score_correction_bias",
            lambda config: (1, config.experts),
        ),
    ),
    neutral={"moe_norm_min": (1e-12,)},
)
