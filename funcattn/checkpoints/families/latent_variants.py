"""Families with multi-head latent attention (`transformer.latent`).

deepseek_v2                 softmax scores; the groups of experts with the best score
deepseek_v3 glm4_moe_lite   the router of DeepSeek-V3: Kimi-K2 too, and GLM-4.7-Flash
sarvam_mla                  the same, by other names
youtu minicpm3              dense; angles on halves and multipliers in the latter

Their files have the keys and values of each head in one matrix, and angles on neighbouring
features at the end of each query and of the shared key.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from ...transformer import Config
from .conventions import TENSORS, read_activation, write_activation
from .latent_layouts import HALVES, NAMES, NEIGHBOURS
from .mixture_variants import (
    EXPERTS,
    SHARED,
    aliased,
    layers_with,
    sparse_layers,
    write_sparse_layers,
)
from .positions import read_rope, rope_object, write_rope
from .sigmoid_mixtures import CHOICE, but_layers, dense_first, read_groups, write_groups
from .tables import Family, Fields, Json, positive, refuse

ALL = "mscale_all_dim"
SIZES = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "feed_forward": "intermediate_size",
    "context": "max_position_embeddings",
    "latent_size": "kv_lora_rank",
    "rotary_size": "qk_rope_head_dim",
    "value_size": "v_head_dim",
}


def read_latent(
    fields: Fields,
    *,
    context: int,
    latent: int = 512,
    query_latent: int | None = 1536,
    plain: int = 128,
    turning: int = 64,
    value: int | None = 128,
    epsilon: float = 1e-6,
    tied: bool = False,
) -> dict[str, Json]:
    """Sizes, rotation and norms of these families; arguments are the defaults of transformers."""
    heads, width = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    turning = fields.whole("qk_rope_head_dim", turning)
    size = fields.whole("qk_nope_head_dim", plain) + turning
    for name, wanted in (("head_dim", turning), ("qk_head_dim", size)):
        if fields.get(name, wanted) != wanted:
            refuse(fields.place(name), f"{wanted}, as the other sizes say", fields.get(name))
    value = width // heads if value is None or fields.says("v_head_dim") else value
    rank = None if fields.says("q_lora_rank") else query_latent
    biased, limit = (
        fields.flag("attention_bias", False),
        fields.whole("max_position_embeddings", context),
    )
    return {
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.whole("num_key_value_heads", heads),
        "head_size": size,
        "feed_forward": fields.whole("intermediate_size"),
        "context": limit,
        "latent_size": fields.whole("kv_lora_rank", latent),
        "query_latent_size": fields.whole("q_lora_rank", rank) or 0,
        "value_size": fields.whole("v_head_dim", value),
        "rotary_size": turning,
        **_read_rope(fields, limit, size),
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", epsilon),
        "tied": fields.flag("tie_word_embeddings", tied),
        "qkv_bias": biased,
        "output_bias": biased,
    }


def _read_rope(fields: Fields, context: int, size: int) -> dict[str, Json]:
    """Rotary fields. The scale of logits is multiplied by the square of yarn's `mscale_all_dim`."""
    renamed = {"deepseek_yarn": "yarn"}
    rope = read_rope(fields, context, renamed=renamed)
    if rope.pop("partial") not in (None, 1.0):
        refuse(fields.place("partial_rotary_factor"), "1.0, or absent", "another fraction")
    said = {name: rope_object(fields, name) for name in ("rope_parameters", "rope_scaling")}
    over, scaling = (said["rope_scaling"] or said["rope_parameters"]).get(ALL), rope["rope_scaling"]
    if not over or scaling is None:
        return rope
    if scaling.kind != "yarn":
        refuse(f"{ALL} of the rotary fields", "absent without yarn", over)
    over = positive(over, f"{ALL} of the rotary fields")
    return {**rope, "attention_scale": _stretched(size, scaling.factor, over)}


def _stretched(size: int, factor: float, over: float) -> float:
    stretch = 0.1 * over * math.log(factor) + 1.0 if factor > 1 else 1.0
    return size**-0.5 * stretch * stretch


def write_latent(config: Config) -> dict[str, object]:
    """The same, written."""
    turning = config.rotary_size or 0
    alone = replace(  # the rotary fields are of the features that turn
        config,
        latent_size=0,
        query_latent_size=0,
        head_size=max(turning, 1),
        rotary_size=None,
        positions="rotary" if turning else "none",
    )
    rope, scaling, usual = write_rope(alone), config.rope_scaling, config.head_size**-0.5
    if config.attention_scale is not None and scaling is not None and scaling.factor > 1:
        stretch = math.log(scaling.factor)
        about = (math.sqrt(config.attention_scale / usual) - 1) / 0.1 / stretch
        over = inverse(
            about, lambda x: _stretched(config.head_size, scaling.factor, x), config.scale
        )
        for name in ("rope_parameters", "rope_scaling"):
            rope[name] = {**rope[name], ALL: over}
    return {
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **rope,
        "head_dim": turning,
        "qk_head_dim": config.head_size,
        "qk_nope_head_dim": config.head_size - turning,
        "q_lora_rank": config.query_latent_size or None,
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.output_bias,
    }


def inverse(about: float, f: Callable[[float], float], wanted: float) -> float:
    """x near `about` with f(x) == wanted, of the fewest decimals; `about` where there is none.

    Example:
        >>> inverse(1.3999999999999997, lambda x: x / 3, 1.4 / 3)
        1.4
    """
    near = [float(f"{about:.{digits}g}") for digits in range(1, 18)]
    for step in (math.inf, -math.inf):
        x = about
        for _ in range(8):
            x = math.nextafter(x, step)
            near.append(x)
    return next((x for x in near if f(x) == wanted), about)


def _read_mixture(
    fields: Fields, chosen: list[bool], *, expert_size: int, of_token: int | None
) -> dict[str, Json]:
    size, usual = fields.whole("moe_intermediate_size", expert_size), of_token
    return {
        **layers_with(chosen, fields.whole("n_routed_experts")),
        "experts_per_token": fields.whole("num_experts_per_tok", *([usual] if usual else [])),
        "expert_size": size,
        "shared_size": size * fields.whole("n_shared_experts"),
    }


def _defaults(fields: Fields, **values: int) -> None:
    """Sizes where the file says nothing."""
    fields.values = {**values, **fields.values}


def _read_deepseek_v2(fields: Fields) -> dict[str, Json]:
    _defaults(fields, n_routed_experts=64, n_shared_experts=2)
    found = read_latent(fields, context=2048)
    chosen = dense_first(fields, found["layers"], 0)
    mixture = _read_mixture(fields, chosen, expert_size=1407, of_token=None)
    kind = fields.choice(
        "topk_method", {"greedy": "greedy", "group_limited_greedy": "groups"}, "greedy"
    )
    groups, kept = fields.whole("n_group", None), fields.whole("topk_group", None)
    if kind == "groups":
        mixture |= {"expert_groups": groups or 1, "groups_per_token": kept or 1, "group_best": 1}
    return {
        **found,
        **mixture,
        "normalized_routing": False,
        "routing_scale": fields.positive("routed_scaling_factor", 1.0),
    }


def _write_deepseek_v2(config: Config) -> dict[str, object]:
    grouped = config.expert_groups > 1 or config.group_best == 1
    return {
        **write_latent(config),
        **write_groups(config, "n_routed_experts", "n_shared_experts"),
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": config.expert_groups if grouped else None,
        "topk_group": config.groups_per_token if grouped else None,
    }


def _read_deepseek_v3(fields: Fields) -> dict[str, Json]:
    experts = aliased(fields, "n_routed_experts", "num_local_experts", 256)
    groups = {} if fields.says("n_group") else {"n_group": 8, "topk_group": 4}
    _defaults(fields, n_routed_experts=experts, n_shared_experts=1, **groups)
    found = read_latent(fields, context=4096)
    layers = found["layers"]
    chosen = dense_first(fields, layers, 3)
    return _with_router(fields, found, chosen, expert_size=2048, of_token=8, scale=2.5)


def _with_router(
    fields: Fields,
    found: dict[str, Json],
    chosen: list[bool],
    *,
    expert_size: int,
    of_token: int,
    scale: float,
) -> dict[str, Json]:
    return {
        **found,
        **_read_mixture(fields, chosen, expert_size=expert_size, of_token=of_token),
        "normalized_routing": fields.flag("norm_topk_prob", True),
        **read_groups(fields),
        "routing_scale": fields.positive("routed_scaling_factor", scale),
    }


def _write_deepseek_v3(config: Config) -> dict[str, object]:
    written = {
        **write_latent(config),
        **write_groups(config, "n_routed_experts", "n_shared_experts"),
    }
    del written["num_experts"]
    return written


def _read_glm4_moe_lite(fields: Fields) -> dict[str, Json]:
    experts = aliased(fields, "n_routed_experts", "num_local_experts", 64)
    _defaults(fields, n_routed_experts=experts, n_shared_experts=1)
    found = read_latent(
        fields, context=202752, query_latent=768, plain=192, value=256, epsilon=1e-5
    )
    layers = found["layers"]
    chosen = sparse_layers(fields, layers, dense_first(fields, layers, 1))
    return _with_router(fields, found, chosen, expert_size=1536, of_token=4, scale=1.8)


def _write_glm4_moe_lite(config: Config) -> dict[str, object]:
    return {**_write_deepseek_v3(config), "mlp_layer_types": write_sparse_layers(config)}


def _read_sarvam(fields: Fields) -> dict[str, Json]:
    experts = aliased(fields, "n_routed_experts", "num_experts", 128)
    shared = aliased(fields, "n_shared_experts", "num_shared_experts", 1)
    _defaults(fields, n_routed_experts=experts, n_shared_experts=shared)
    turning = fields.whole("qk_rope_head_dim", 64)
    fields.values = {**fields.values, "head_dim": turning}  # of older files, for another program
    found = read_latent(fields, context=4096, query_latent=None)
    fields.get("q_head_dim")
    chosen = dense_first(fields, found["layers"], 1)
    return _with_router(fields, found, chosen, expert_size=2048, of_token=8, scale=2.5)


def _read_youtu(fields: Fields) -> dict[str, Json]:
    return read_latent(fields, context=131072, tied=True)


def _read_minicpm3(fields: Fields) -> dict[str, Json]:
    found = read_latent(
        fields,
        context=32768,
        latent=256,
        query_latent=768,
        plain=64,
        turning=32,
        value=None,
        epsilon=1e-5,
        tied=True,
    )
    layers, width = found["layers"], found["width"]
    of = lambda name, usual: fields.positive(name, None if fields.says(name) else usual)
    depth, base = of("scale_depth", 1.4), of("dim_model_base", 256)
    return {
        **found,
        "feed_forward_bias": fields.flag("mlp_bias", False),
        "embedding_scale": fields.positive("scale_emb", 12.0),
        "residual_scale": 1.0 if depth is None else depth / math.sqrt(layers),
        "logit_scale": 1.0 if base is None else base / width,
    }


def _write_minicpm3(config: Config) -> dict[str, object]:
    root, width = math.sqrt(config.layers), config.width
    depth = inverse(config.residual_scale * root, lambda x: x / root, config.residual_scale)
    base = inverse(config.logit_scale * width, lambda x: x / width, config.logit_scale)
    return {
        **write_latent(config),
        "mlp_bias": config.feed_forward_bias,
        "scale_emb": config.embedding_scale,
        "scale_depth": depth,
        "dim_model_base": int(base) if base == int(base) else base,
    }


ROUTED = {**SHARED, **CHOICE, **NAMES}
SIGMOID = {
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _read_deepseek_v2,
    _write_deepseek_v2,
    {**SHARED, **NAMES},
    packs=(*NEIGHBOURS, *EXPERTS),
    neutral={
        "mlp_bias": (False,),
        "norm_topk_prob": (False,),
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
    },
)
DEEPSEEK_V3, GLM4_MOE_LITE, SARVAM_MLA = (
    Family(
        name,
        architecture,
        read,
        write,
        ROUTED,
        packs=(*NEIGHBOURS, *EXPERTS),
        neutral=SIGMOID,
        harmless=but_layers(layer),
        also=also,
    )
    for name, architecture, read, write, layer, also in (
        (
            *("deepseek_v3", "DeepseekV3ForCausalLM"),
            *(_read_deepseek_v3, _write_deepseek_v3, 61, ()),
        ),
        (
            *("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
            *(_read_glm4_moe_lite, _write_glm4_moe_lite, 47, ()),
        ),
        (
            *("sarvam_mla", "SarvamMLAForCausalLM", _read_sarvam, _write_deepseek_v3),
            *(32, ("DeepseekV3ForCausalLM", "DeepseekV3Model")),
        ),
    )
)
YOUTU = Family(
    "youtu",
    "YoutuForCausalLM",
    _read_youtu,
    write_latent,
    {**TENSORS, **NAMES},
    packs=NEIGHBOURS,
    neutral={"rope_interleave": (True,)},
)
MINICPM3 = Family(
    "minicpm3",
    "MiniCPM3ForCausalLM",
    _read_minicpm3,
    _write_minicpm3,
    {**TENSORS, **NAMES},
    packs=HALVES,
)
