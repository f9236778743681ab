"""Nemotron-H: layers of one part, which is Mamba-2, attention without positions, a feed-forward or
experts; neither of the last two is gated.
"""

import math

from ...transformer import Config
from .conventions import read_activation, write_activation
from .layouts import stacked
from .mambas import KINDS, THEIRS, mamba_names, mamba_packs
from .tables import Family, Fields, Json, positive, refuse

BLOCK = "backbone.layers.{}."
PARTS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
DEFAULT = ("linear_attention", "moe", "full_attention", "mlp")
LEGACY = {"mamba": "linear_attention", "attention": "full_attention"}
UNREAD_PARTS = (
    *("num_logits_to_keep", "use_mamba_kernels", "mamba_ssm_cache_dtype", "chunk_size", "expand"),
    *("time_step_max", "time_step_limit", "time_step_floor", "time_step_rank", "mamba_proj_bias"),
    *("moe_shared_expert_overlap", "n_shared_experts", "mtp_layers_block_type"),
    *("mtp_hybrid_override_pattern", "rescale_prenorm_residual", "residual_in_fp32"),
    *("attention_bias", "num_hidden_layers", "rope_theta", "rope_scaling", "rope_parameters"),
    *("partial_rotary_factor", "attention_head_dim", "is_mamba2_hybrid", "hidden_act"),
)


def _read_parts(fields: Fields) -> list[str]:
    """What each layer is, of PARTS."""
    kinds = fields.items("layers_block_type") or fields.items("layer_types")
    pattern = fields.get("hybrid_override_pattern", "")
    if not kinds and isinstance(pattern, str):
        kinds = [{sign: kind for kind, sign in PARTS.items()}.get(sign, sign) for sign in pattern]
    kinds = kinds or list(DEFAULT)
    kinds = [LEGACY.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if not kinds or any(kind not in PARTS for kind in kinds):
        wanted = f"{', '.join(PARTS)} for each layer"
        refuse(fields.place("layers_block_type"), wanted, kinds)
    if not {"full_attention", "linear_attention"} <= {*kinds}:
        refuse(fields.place("layers_block_type"), "with both kinds of attention", kinds)
    return kinds


def _read_nemotron_h(fields: Fields) -> dict[str, Json]:
    for name in UNREAD_PARTS:
        fields.get(name)
    kinds = _read_parts(fields)
    mixes = [kind.endswith("attention") for kind in kinds]
    if fields.get("mamba_hidden_act", "silu") != "silu":
        refuse(fields.place("mamba_hidden_act"), "silu", fields.get("mamba_hidden_act"))
    if fields.get("moe_latent_size") is not None:
        refuse(fields.place("moe_latent_size"), "absent", fields.get("moe_latent_size"))
    bias, experts = fields.flag("mlp_bias", False), [kind == "moe" for kind in kinds]
    if bias and any(experts):
        refuse(fields.place("mlp_bias"), "false beside experts", True)
    routed = _read_nemotron_experts(fields, experts)
    heads = fields.whole("num_attention_heads", 32)
    least = fields.get("time_step_min", 0.001)
    where = fields.place("time_step_min")
    return {
        "vocabulary": fields.whole("vocab_size", 131072),
        "width": fields.whole("hidden_size", 4096),
        "layers": len(kinds),
        "heads": heads,
        "kv_heads": fields.whole(
            "num_key_value_heads", heads if fields.says("num_key_value_heads") else 8
        ),
        "head_size": fields.whole("head_dim", 128),
        "feed_forward": fields.whole("intermediate_size", 21504),
        "context": fields.whole("max_position_embeddings", 4096),
        "activation": read_activation(fields, "relu2", "mlp_hidden_act"),
        "norm_epsilon": fields.positive("layer_norm_epsilon", 1e-5),
        "tied": fields.flag("tie_word_embeddings", False),
        "positions": "none",
        "gated": False,
        "feed_forward_bias": bias,
        "feed_forward_layers": tuple(not mixing for mixing in mixes),
        "mixers": tuple(KINDS.get(kind, "none") for kind in kinds),
        "state_heads": fields.whole("mamba_num_heads", 128),
        "state_value_size": fields.whole("mamba_head_dim", 64),
        "state_key_heads": fields.whole("n_groups", 8),
        "state_key_size": fields.whole("ssm_state_size", 128),
        "convolution_size": fields.whole("conv_kernel", 4),
        "convolution_bias": fields.flag("use_conv_bias", True),
        "mixer_bias": fields.flag("use_bias", False),
        "mixer_output_bias": fields.flag("use_bias", False),
        "step_limit": (0.0 if least == 0 else positive(least, where), math.inf),
        **(routed if any(experts) else {}),
    }


def _read_nemotron_experts(fields: Fields, chosen: list[bool]) -> dict[str, Json]:
    return {
        "experts": fields.whole("n_routed_experts", 8),
        "expert_layers": tuple(chosen),
        "experts_per_token": fields.whole("num_experts_per_tok", 2),
        "expert_size": fields.whole("moe_intermediate_size", 7688),
        "shared_size": fields.whole("moe_shared_expert_intermediate_size", 7688),
        "normalized_routing": fields.flag("norm_topk_prob", True),
        "router_scores": "sigmoid",
        "choice_bias": True,
        "expert_groups": fields.whole("n_group", 1),
        "groups_per_token": fields.whole("topk_group", 1),
        "routing_scale": fields.positive("routed_scaling_factor", 1.0),
    }


def _write_nemotron_h(config: Config) -> dict[str, object]:
    specs = [config.layer_spec(i) for i in range(config.layers)]
    kinds = [THEIRS.get(spec.mixer, "moe" if spec.experts else "mlp") for spec in specs]
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "layers_block_type": kinds,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward,
        "max_position_embeddings": config.context,
        "mlp_hidden_act": write_activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "mlp_bias": config.feed_forward_bias,
        "mamba_num_heads": config.state_heads,
        "mamba_head_dim": config.state_value_size,
        "n_groups": config.state_key_heads,
        "ssm_state_size": config.state_key_size,
        "conv_kernel": config.convolution_size,
        "use_conv_bias": config.convolution_bias,
        "use_bias": config.mixer_bias,
        "time_step_min": config.step_limit[0],
        "n_routed_experts": config.experts or 1,
        "num_experts_per_tok": config.experts_per_token or 1,
        "moe_intermediate_size": config.expert_size or 1,
        "moe_shared_expert_intermediate_size": config.shared_size or 1,
        "norm_topk_prob": config.normalized_routing,
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "routed_scaling_factor": config.routing_scale,
    }


NEMOTRON_H = Family(
    "nemotron_h",
    "NemotronHForCausalLM",
    _read_nemotron_h,
    _write_nemotron_h,
    {
        "embedding": "backbone.embeddings.weight",
        "norm": "backbone.norm_f.weight",
        "head": "lm_head.weight",
        **{
            f"layers.{{}}.{part}_norm": BLOCK + "norm.weight"
            for part in ("attention", "feed_forward")
        },
        **{f"layers.{{}}.{leaf}": BLOCK + f"mixer.{leaf}_proj.weight" for leaf in "qkvo"},
        **{
            f"layers.{{}}.{leaf}{ours}": BLOCK + f"mixer.{leaf}_proj.{theirs}"
            for leaf in ("up", "down")
            for ours, theirs in (("", "weight"), ("_bias", "bias"))
        },
        "layers.{}.router": BLOCK + "mixer.gate.weight",
        "layers.{}.choice_bias": BLOCK + "mixer.gate.e_score_correction_bias",
        **{
            f"layers.{{}}.shared_{leaf}": BLOCK + f"mixer.shared_experts.{leaf}_proj.weight"
            for leaf in ("up", "down")
        },
        **mamba_names(BLOCK + "mixer."),
    },
    packs=(
        *mamba_packs(BLOCK + "mixer."),
        *(
            stacked(f"layers.{{}}.{leaf}", BLOCK + f"mixer.experts.{{expert}}.{leaf}_proj.weight")
            for leaf in ("up", "down")
        ),
    ),
    prefix="backbone.",
)
