"""Mixtures of experts whose routers or files are their own.

aria_text     experts in one tensor, as (in, out)
phimoe        two experts, each by a softmax over those near the best; layer norms
cohere2_moe   scores of the chosen, the mean with an expert that every token takes
sarvam_moe    GLM-4-MoE by other defaults
"""

from dataclasses import replace

from ...transformer import Config
from .conventions import TENSORS, read_windows, write_windows
from .fused import COHERE, read_cohere, rows_of_heads
from .gpt import PARTS
from .layouts import fused, halves, of_experts, renamed, turned
from .llama import write_common
from .llama_variants import LAYER, read_variant
from .mixture_variants import (
    EXPERTS,
    layers_with,
    shared_names,
    sparse_layers,
    write_experts,
    write_sparse_layers,
)
from .mixtures import MIXTRAL
from .sigmoid_mixtures import GLM4_MOE
from .tables import Family, Fields, Json, Pack, refuse

COMBINED = "shared_expert_combination_strategy"
ROUTER = {"layers.{}.router": LAYER + "mlp.gate.weight"}


def _read_aria(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=2048)
    if fields.flag("mlp_bias", False):
        refuse(fields.place("mlp_bias"), False, True)
    if common["activation"] != "silu":  # the experts have it, whatever is said
        refuse(fields.place("hidden_act"), "silu", fields.get("hidden_act"))
    size = common["feed_forward"]
    return {
        **common,
        "experts": fields.whole("moe_num_experts", 8),
        "experts_per_token": fields.whole("moe_topk", 2),
        "expert_size": size,
        "shared_size": size * fields.whole("moe_num_shared_experts", 2),
    }


def _write_aria(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        "moe_num_experts": config.experts,
        "moe_topk": config.experts_per_token,
        "moe_num_shared_experts": config.shared_size // max(config.expert_size, 1),
    }


def _read_phimoe(fields: Fields) -> dict[str, Json]:
    kv_heads = None if fields.says("num_key_value_heads") else 8
    common = read_variant(fields, context=131072, base=1e6, epsilon=1e-5, kv_heads=kv_heads)
    if common["rope_scaling"] is not None:  # whose factors of cos and sin its class has its own
        refuse(fields.place("rope_parameters"), "of rope_type default", "another")
    chosen = fields.whole("num_experts_per_tok", 2)
    if chosen != 2:
        refuse(fields.place("num_experts_per_tok"), "2, as its router takes", chosen)
    return {
        **common,
        "norm": "layer",
        "norm_bias": True,
        "window": fields.whole("sliding_window", None),
        "experts": fields.whole("num_local_experts", 16),
        "experts_per_token": chosen,
        "expert_size": common["feed_forward"],
        "router_scores": "sparsemixer",
        "router_margin": fields.positive("router_jitter_noise", 0.01),
        "head_bias": fields.flag("lm_head_bias", False),
    }


def _write_phimoe(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        "sliding_window": config.window,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_jitter_noise": config.router_margin,
        "lm_head_bias": config.head_bias,
    }


def _read_cohere2_moe(fields: Fields) -> dict[str, Json]:
    if not fields.says("head_dim"):
        fields.values = {**fields.values, "head_dim": 128}
    found = read_cohere(fields, base=10000.0)
    layers, size = found["layers"], found["feed_forward"]
    first = fields.get("first_k_dense_replace", 0)
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= layers:
        refuse(fields.place("first_k_dense_replace"), "a number of layers", first)
    near, far = (
        fields.whole("prefix_dense_sliding_window_pattern", 1),
        fields.whole("sliding_window_pattern", 4),
    )
    local = [bool((i + 1) % near) for i in range(first)]
    local += [bool((i + 1) % far) for i in range(layers - first)]
    default = None if fields.says("sliding_window") else 4096
    windows = read_windows(fields, fields.whole("sliding_window", default), layers, local)
    chosen = sparse_layers(fields, layers, [i >= first for i in range(layers)])
    seen = windows["window_layers"] or (windows["window"] is not None,) * layers
    turns = tuple(x or (near == 1 and not y) for x, y in zip(seen, chosen, strict=True))
    dense = fields.whole("prefix_dense_intermediate_size", None)
    if dense is None and not all(chosen):
        refuse(fields.place("prefix_dense_intermediate_size"), "a size, of dense layers", None)
    scores, shared = (
        fields.choice("expert_selection_fn", {x: x for x in ("softmax", "sigmoid")}, "softmax"),
        fields.get("num_shared_experts", 0),
    )
    shared = shared if shared == 0 else fields.whole("num_shared_experts", 0)
    means = {x: x for x in ("average", "sum")}
    factor = 0.5 if fields.choice(COMBINED, means, "average") == "average" else 1.0
    epsilon = fields.positive("rms_norm_eps", None)
    return {
        **found,
        **windows,
        "rotary_layers": () if all(turns) else turns,
        "head_norm": "none",
        **({} if epsilon is None else {"norm": "rms", "norm_epsilon": epsilon}),
        "feed_forward": dense or size,
        **layers_with(chosen, fields.whole("num_experts", 8)),
        "experts_per_token": fields.whole("num_experts_per_tok", 2),
        "expert_size": size,
        "normalized_routing": fields.flag("norm_topk_prob", True) or scores == "softmax",
        "router_scores": scores,
        "shared_size": size * shared,
        "routing_scale": factor if shared else 1.0,
    }


def _write_cohere2_moe(config: Config) -> dict[str, object]:
    rms = config.norm == "rms"
    specs = [config.layer_spec(i) for i in range(config.layers)]
    turns = any(spec.rotary and not spec.experts and spec.window is None for spec in specs)
    return {
        **COHERE.write(config),
        **write_experts(config),
        **write_windows(config),
        "use_qk_norm": None,
        "rms_norm_eps": config.norm_epsilon if rms else None,
        "layer_norm_eps": 1e-5 if rms else config.norm_epsilon,
        "intermediate_size": config.expert_size,
        "prefix_dense_intermediate_size": config.feed_forward,
        "prefix_dense_sliding_window_pattern": 1 if turns else 2,
        "mlp_layer_types": write_sparse_layers(config),
        "expert_selection_fn": config.router_scores,
        "num_shared_experts": config.shared_size // max(config.expert_size, 1),
        "shared_expert_combination_strategy": "average" if config.routing_scale == 0.5 else "sum",
    }


def _averaged(path: str, name: str) -> Pack:
    """The last matrix of a shared expert, with the factor of the mean, which is a power of two."""
    return replace(
        renamed(path, name, lambda _: True),
        unpack=lambda config, x: [x[0] * config.routing_scale],
        pack=lambda config, x: [x[0] / config.routing_scale],
    )


SARVAM = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1024,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "partial_rotary_factor": 1.0,
    "rope_theta": 8e6,
}
SARVAM_NAMES = {
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "use_qkv_bias": "attention_bias",
}


def _read_sarvam(fields: Fields) -> dict[str, Json]:
    values = {**SARVAM, **fields.values}
    for theirs, ours in SARVAM_NAMES.items():
        if theirs in fields.values:
            other = values.setdefault(ours, fields.get(theirs))
            if other != fields.get(theirs):
                refuse(fields.place(theirs), f"absent, or what {ours} is", fields.get(theirs))
    fields.values = values
    return GLM4_MOE.read(fields)


ARIA = Family(
    "aria_text",
    "AriaTextForCausalLM",
    _read_aria,
    _write_aria,
    {
        **TENSORS,
        **shared_names("mlp.shared_experts"),
        "layers.{}.router": LAYER + "mlp.router.weight",
    },
    packs=(
        turned(halves(LAYER + "mlp.experts.fc1.weight", turned=True)),
        turned(of_experts("layers.{}.down", LAYER + "mlp.experts.fc2.weight", turned=True)),
    ),
)
PHIMOE = Family(
    "phimoe",
    "PhimoeForCausalLM",
    _read_phimoe,
    _write_phimoe,
    {**MIXTRAL.tensors, "head_bias": "lm_head.bias"},
    packs=MIXTRAL.packs,
    neutral={"input_jitter_noise": (0.0, 0)},
)
COHERE2_MOE = Family(
    "cohere2_moe",
    "Cohere2MoeForCausalLM",
    _read_cohere2_moe,
    _write_cohere2_moe,
    {**TENSORS, **ROUTER, **shared_names("mlp.shared_experts")},
    packs=(
        *COHERE.packs,
        *EXPERTS,
        _averaged("layers.{}.shared_down", LAYER + "mlp.shared_experts.down_proj.weight"),
    ),
)
HEADS = LAYER + "attention."
SARVAM_MOE = replace(
    GLM4_MOE,
    name="sarvam_moe",
    read=_read_sarvam,
    also=("SarvamMoEForCausalLM",),
    tensors={
        **GLM4_MOE.tensors,
        "embedding": "model.word_embeddings.weight",
        "layers.{}.o": HEADS + "dense.weight",
        "layers.{}.q_norm": HEADS + "query_layernorm.weight",
        "layers.{}.k_norm": HEADS + "key_layernorm.weight",
        "layers.{}.choice_bias": LAYER + "mlp.gate.expert_bias",
    },
    packs=(
        *EXPERTS,
        *(
            fused(
                [f"layers.{{}}.{leaf}{ours}" for leaf in "qkv"],
                f"{HEADS}query_key_value.{theirs}",
                rows_of_heads,
            )
            for theirs, ours in PARTS
        ),
    ),
)
