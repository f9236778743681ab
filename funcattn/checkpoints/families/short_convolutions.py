"""Families with short convolutions in the place of attention in most layers.

lfm2        dense
lfm2_moe    experts with sigmoid scores behind the first layers
"""

from ...transformer import Config
from .conventions import read_sizes, write_sizes
from .layouts import squeezed, stacked
from .llama_variants import LAYER
from .mixture_variants import layers_with, write_experts
from .positions import read_rope, whole_heads, write_rope
from .tables import Family, Fields, Json, refuse

NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.embedding_norm.weight",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": LAYER + "operator_norm.weight",
    "layers.{}.feed_forward_norm": LAYER + "ffn_norm.weight",
    **{f"layers.{{}}.{leaf}": LAYER + f"self_attn.{leaf}_proj.weight" for leaf in "qkv"},
    "layers.{}.o": LAYER + "self_attn.out_proj.weight",
    "layers.{}.q_norm": LAYER + "self_attn.q_layernorm.weight",
    "layers.{}.k_norm": LAYER + "self_attn.k_layernorm.weight",
    **{
        f"layers.{{}}.mixer_{leaf}{ours}": LAYER + f"conv.{leaf}_proj.{theirs}"
        for leaf in ("in", "out")
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
    },
    "layers.{}.convolution_bias": LAYER + "conv.conv.bias",
    **{
        f"layers.{{}}.{leaf}": LAYER + f"feed_forward.{name}.weight" for leaf, name in NAMES.items()
    },
    "layers.{}.router": LAYER + "feed_forward.gate.weight",
    "layers.{}.choice_bias": LAYER + "feed_forward.expert_bias",
}
CONVOLUTION = squeezed("layers.{}.convolution", LAYER + "conv.conv.weight")
# Of the published files; its class reads none of them.
UNREAD = (
    *("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "conv_dim"),
    *("block_use_swiglu", "block_use_xavier_init", "conv_dim_out", "conv_use_xavier_init"),
    *("num_heads", "theta", "use_pos_enc", "full_attn_idxs"),
)


def _read_mixers(fields: Fields, layers: int) -> tuple[str, ...]:
    kinds = fields.items("layer_types")
    if not kinds:
        chosen = fields.items("full_attn_idxs") or list(range(layers))
        kinds = ["full_attention" if i in chosen else "conv" for i in range(layers)]
    ours = {"full_attention": "attention", "conv": "short_convolution"}
    if len(kinds) != layers or any(kind not in ours for kind in kinds):
        wanted = f"full_attention or conv for each of the {layers} layers"
        refuse(fields.place("layer_types"), wanted, kinds)
    return tuple(ours[kind] for kind in kinds)


def _read_both(fields: Fields) -> dict[str, Json]:
    for name in UNREAD:
        fields.get(name)
    sizes = read_sizes(fields, context=128000, kv_heads=8)
    tied = fields.flag("tie_embedding", fields.flag("tie_word_embeddings", True))
    return {
        **sizes,
        **whole_heads(read_rope(fields, sizes["context"], base=1e6)),
        "norm_epsilon": fields.positive("norm_eps", 1e-5),
        "tied": tied,
        "head_norm": "rms",
        "mixers": _read_mixers(fields, sizes["layers"]),
        "convolution_size": fields.whole("conv_L_cache", 3),
        "convolution_bias": fields.flag("conv_bias", False),
    }


def _write_both(config: Config) -> dict[str, object]:
    kinds = {"attention": "full_attention", "short_convolution": "conv"}
    return {
        **write_sizes(config),
        **write_rope(config),
        "norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "layer_types": [kinds.get(kind, kind) for kind in config.mixers],
        "conv_L_cache": config.convolution_size,
        "conv_bias": config.convolution_bias,
    }


def _read_lfm2(fields: Fields) -> dict[str, Json]:
    if fields.get("block_ff_dim") is not None:
        fields.values["intermediate_size"] = fields.get("block_ff_dim")
    both = _read_both(fields)
    size, every = both["feed_forward"], fields.whole("block_multiple_of", 256)
    factor = fields.positive("block_ffn_dim_multiplier", 1.0)
    if fields.flag("block_auto_adjust_ff_dim", True):
        size = int(factor * int(2 * size / 3))
        size = every * -(-size // every)
    return {**both, "feed_forward": size}


def _write_lfm2(config: Config) -> dict[str, object]:
    return {**_write_both(config), "block_auto_adjust_ff_dim": False}


def _read_lfm2_moe(fields: Fields) -> dict[str, Json]:
    both = _read_both(fields)
    first = fields.get("num_dense_layers", 2)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        refuse(fields.place("num_dense_layers"), "a number of layers", first)
    chosen = [i >= first for i in range(both["layers"])]
    return {
        **both,
        **layers_with(chosen, fields.whole("num_experts", 32)),
        "experts_per_token": fields.whole("num_experts_per_tok", 4),
        "expert_size": fields.whole("moe_intermediate_size", 1792),
        "normalized_routing": fields.flag("norm_topk_prob", True),
        "router_scores": "sigmoid",
        "choice_bias": fields.flag("use_expert_bias", True),
        "routing_scale": fields.positive("routed_scaling_factor", 1.0),
    }


def _write_lfm2_moe(config: Config) -> dict[str, object]:
    dense = [i for i in range(config.layers) if not config.layer_spec(i).experts]
    return {
        **_write_both(config),
        **write_experts(config),
        "num_dense_layers": len(dense),
        "moe_intermediate_size": config.expert_size,
        "use_expert_bias": config.choice_bias,
        "routed_scaling_factor": config.routing_scale,
    }


LFM2 = Family("lfm2", "Lfm2ForCausalLM", _read_lfm2, _write_lfm2, TENSORS, packs=(CONVOLUTION,))
LFM2_MOE = Family(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    _read_lfm2_moe,
    _write_lfm2_moe,
    TENSORS,
    packs=(
        CONVOLUTION,
        *(
            stacked(f"layers.{{}}.{leaf}", LAYER + f"feed_forward.experts.{{expert}}.{name}.weight")
            for leaf, name in NAMES.items()
        ),
    ),
)
