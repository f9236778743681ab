"""Families whose embedding is normalized, or whose attention has a bias linear in the distance.

nanochat   norms without weights, a squared relu, angles the other way around
bloom mpt  ALiBi; in mpt without a bias anywhere, and queries, keys and values that may be clamped
dbrx       clamped too; rotary; experts
"""

import re
from collections.abc import Mapping

from torch import Tensor

from ...transformer import Config
from .conventions import read_activation, write_activation
from .fused import rows_of_heads
from .gpt import LAYER_NORM, PARTS, of_layers
from .ignored import IGNORED
from .layouts import fused, implied, of_groups, ones
from .llama import write_common
from .llama_variants import LAYER, read_variant
from .positions import read_rope, whole_heads, write_rope
from .tables import Family, Fields, Json, Pack, refuse

BLOCK, MPT_BLOCK = "transformer.h.{}.", "transformer.blocks.{}."


def _read_nanochat(fields: Fields) -> dict[str, Json]:
    fields.values = {"hidden_act": "relu2", **fields.values}
    common = read_variant(fields, context=2048)
    default = None if fields.says("final_logit_softcapping") else 15.0
    return {
        **common,
        "gated": False,
        "head_norm": "unit",
        "late_head_norm": True,
        "embedding_norm": True,
        "logit_cap": fields.positive("final_logit_softcapping", default),
    }


def _write_nanochat(config: Config) -> dict[str, object]:
    return {**write_common(config), "final_logit_softcapping": config.logit_cap}


def _turned_back(path: str, name: str) -> Pack:
    """Rows of heads that turn the other way: with their halves exchanged they turn as ours."""

    def exchanged(config: Config, x: list[Tensor]) -> list[Tensor]:
        heads = x[0].unflatten(0, (-1, 2, config.head_size // 2))
        return [heads.flip(1).flatten(0, 2).contiguous()]

    return Pack((path,), (name,), exchanged, exchanged)


def _read_bloom(fields: Fields) -> dict[str, Json]:
    found = fields.values
    for name, alias in (
        ("hidden_size", "n_embed"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
    ):
        value = found.get(name, found.get(alias))
        if alias in found and found[alias] != value:
            refuse(fields.place(alias), f"absent, or what {name} is", found[alias])
        fields.values = {**fields.values, name: value}
        fields.get(alias)
    width, heads = fields.whole("hidden_size"), fields.whole("n_head")
    after = fields.flag("apply_residual_connection_post_layernorm", False)
    for name in ("slow_but_exact", "pretraining_tp"):
        fields.get(name)  # the order of a sum
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "feed_forward": 4 * width,
        "context": fields.whole("seq_length", 2048),
        "positions": "alibi",
        "activation": "gelu_tanh",
        "norm_epsilon": fields.positive("layer_norm_epsilon", 1e-5),
        "norm_placement": "residual" if after else "before",
        "embedding_norm": True,
        "qkv_bias": True,
        "output_bias": True,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_bloom(config: Config) -> dict[str, object]:
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "seq_length": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        "apply_residual_connection_post_layernorm": config.norm_placement == "residual",
        "tie_word_embeddings": config.tied,
    }


def _inner(fields: Fields, name: str, neutral: Mapping[str, tuple[object, ...]]) -> Fields:
    """The fields of an object of config.json, to be read; `check` it then."""
    value = fields.get(name, {})
    if not isinstance(value, dict):
        refuse(fields.place(name), "an object", value)
    inner = Fields(value, f"{{}} of {name} in config.json")
    inner.check_neutral(neutral)
    return inner


MPT_ATTENTION: Mapping[str, tuple[object, ...]] = {
    # As its class of transformers takes it, which reads none of these.
    "attn_type": ("multihead_attention",),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "attn_uses_sequence_id": (False,),
    "alibi": (True,),
    "alibi_bias_max": (8,),
}
OF_OBJECTS = IGNORED | {"attn_impl", "attn_pdrop", "moe_jitter_eps", "moe_loss_weight"}


def _read_mpt(fields: Fields) -> dict[str, Json]:
    width, heads = fields.whole("d_model"), fields.whole("n_heads")
    inner = _inner(fields, "attn_config", MPT_ATTENTION)
    found = {
        "attention_scale": inner.positive("softmax_scale", None),
        "qkv_limit": inner.positive("clip_qkv", None) if inner.get("clip_qkv") != 0 else None,
    }
    inner.check_known(OF_OBJECTS | MPT_ATTENTION.keys())
    for name in ("learned_pos_emb", "init_device", "embedding_fraction", "norm_type"):
        fields.get(name)
    ratio = fields.whole("expansion_ratio", 4)
    if ratio != 4:  # that of its class, whatever is said
        refuse(fields.place("expansion_ratio"), 4, ratio)
    return {
        **found,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("n_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "feed_forward": 4 * width,
        "context": fields.whole("max_seq_len", 2048),
        "positions": "alibi",
        "activation": "gelu",
        "gated": False,
        "norm": "layer",
        "norm_epsilon": fields.positive("layer_norm_epsilon", 1e-5),
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_mpt(config: Config) -> dict[str, object]:
    return {
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "max_seq_len": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        "attn_config": {"clip_qkv": config.qkv_limit, "softmax_scale": config.attention_scale},
        "tie_word_embeddings": config.tied,
    }


def _read_dbrx(fields: Fields) -> dict[str, Json]:
    width, heads = fields.whole("d_model"), fields.whole("n_heads")
    attention = _inner(fields, "attn_config", {})
    context = fields.whole("max_seq_len", 2048)
    rope = whole_heads(read_rope(fields, context))
    # its class asks for this and turns by the other, so that only equal ones are one model
    if attention.positive("rope_theta", rope["rope_base"]) != rope["rope_base"]:
        wanted = f"what rope_parameters say, {rope['rope_base']}"
        refuse(attention.place("rope_theta"), wanted, attention.get("rope_theta"))
    kv_heads, limit = attention.whole("kv_n_heads", 1), attention.positive("clip_qkv", None)
    attention.check_known(OF_OBJECTS)
    experts = _inner(fields, "ffn_config", {})
    act = experts.get("ffn_act_fn", {"name": "silu"})
    if not isinstance(act, dict) or act.keys() != {"name"}:
        refuse(experts.place("ffn_act_fn"), "an object with a name", act)
    normalized = experts.get("moe_normalize_expert_weights", 1.0)
    if experts.says("moe_normalize_expert_weights"):
        normalized = experts.get("moe_normalize_expert_weights")
    if normalized not in (1, None):
        refuse(experts.place("moe_normalize_expert_weights"), "1, or null", normalized)
    size = experts.whole("ffn_hidden_size", 3584)
    found = {
        "experts": experts.whole("moe_num_experts", 4),
        "experts_per_token": experts.whole("moe_top_k", 1),
        "activation": read_activation(Fields({"name": act["name"]}), name="name"),
    }
    experts.get("hidden_size")  # that of the model
    experts.check_known(OF_OBJECTS)
    return {
        **found,
        **rope,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("n_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": width // heads,
        "feed_forward": size,
        "expert_size": size,
        "normalized_routing": normalized is not None,
        "context": context,
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "qkv_limit": limit,
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _write_dbrx(config: Config) -> dict[str, object]:
    return {
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "max_seq_len": config.context,
        **write_rope(config),
        "attn_config": {
            "clip_qkv": config.qkv_limit,
            "kv_n_heads": config.kv_heads,
            "rope_theta": config.rope_base,
        },
        "ffn_config": {
            "ffn_hidden_size": config.expert_size,
            "moe_num_experts": config.experts,
            "moe_top_k": config.experts_per_token,
            "moe_normalize_expert_weights": 1.0 if config.normalized_routing else None,
            "ffn_act_fn": {"name": write_activation(config)},
        },
        "tie_word_embeddings": config.tied,
    }


def _rows_of_experts(leaf: str, name: str) -> Pack:
    """Experts one under the other, (X F, E); `down` as its transpose."""
    turn = lambda x: x.mT if leaf == "down" else x
    return Pack(
        (f"layers.{{}}.{leaf}",),
        (name,),
        lambda config, x: [turn(x[0].unflatten(0, (config.experts, -1))).contiguous()],
        lambda config, x: [turn(x[0]).flatten(0, 1).contiguous()],
    )


QKV = [f"layers.{{}}.{leaf}" for leaf in "qkv"]
NANOCHAT = Family(
    "nanochat",
    "NanoChatForCausalLM",
    _read_nanochat,
    _write_nanochat,
    {
        "embedding": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        **{f"layers.{{}}.{x}": f"{LAYER}self_attn.{x}_proj.weight" for x in "ko"},
        **{f"layers.{{}}.{x}_bias": f"{LAYER}self_attn.{x}_proj.bias" for x in "vo"},
        "layers.{}.up": LAYER + "mlp.fc1.weight",
        "layers.{}.down": LAYER + "mlp.fc2.weight",
    },
    packs=(
        implied(["embedding", "norm", "embedding_norm"], "model.embed_tokens.weight", ones),
        implied(
            ["layers.{}.v", "layers.{}.attention_norm", "layers.{}.feed_forward_norm"],
            LAYER + "self_attn.v_proj.weight",
            ones,
        ),
        *(
            _turned_back(f"layers.{{}}.{x}{ours}", f"{LAYER}self_attn.{x}_proj.{theirs}")
            for x in "qk"
            for theirs, ours in PARTS
        ),
    ),
)
BLOOM = Family(
    "bloom",
    "BloomForCausalLM",
    _read_bloom,
    _write_bloom,
    {
        "embedding": "transformer.word_embeddings.weight",
        "embedding_norm": "transformer.word_embeddings_layernorm.weight",
        "embedding_norm_bias": "transformer.word_embeddings_layernorm.bias",
        "norm": "transformer.ln_f.weight",
        "norm_bias": "transformer.ln_f.bias",
        "head": "lm_head.weight",
        **of_layers(
            (
                ("attention_norm", "input_layernorm"),
                ("feed_forward_norm", "post_attention_layernorm"),
                ("o", "self_attention.dense"),
                ("up", "mlp.dense_h_to_4h"),
                ("down", "mlp.dense_4h_to_h"),
            ),
            BLOCK,
        ),
    },
    packs=tuple(
        of_groups(
            [f"layers.{{}}.{leaf}{ours}" for leaf in "qkv"],
            f"{BLOCK}self_attention.query_key_value.{theirs}",
        )
        for theirs, ours in PARTS
    ),
    prefix="transformer.",
)
MPT = Family(
    "mpt",
    "MptForCausalLM",
    _read_mpt,
    _write_mpt,
    {
        "embedding": "transformer.wte.weight",
        "norm": "transformer.norm_f.weight",
        "head": "lm_head.weight",
        "layers.{}.attention_norm": MPT_BLOCK + "norm_1.weight",
        "layers.{}.feed_forward_norm": MPT_BLOCK + "norm_2.weight",
        "layers.{}.o": MPT_BLOCK + "attn.out_proj.weight",
        "layers.{}.up": MPT_BLOCK + "ffn.up_proj.weight",
        "layers.{}.down": MPT_BLOCK + "ffn.down_proj.weight",
    },
    packs=(fused(QKV, MPT_BLOCK + "attn.Wqkv.weight", rows_of_heads),),
    neutral={"logit_scale": (), "no_bias": (True,)},
    prefix="transformer.",
)
DBRX = Family(
    "dbrx",
    "DbrxForCausalLM",
    _read_dbrx,
    _write_dbrx,
    {
        "embedding": "transformer.wte.weight",
        "norm": "transformer.norm_f.weight",
        "head": "lm_head.weight",
        "layers.{}.attention_norm": MPT_BLOCK + "norm_attn_norm.norm_1.weight",
        "layers.{}.feed_forward_norm": MPT_BLOCK + "norm_attn_norm.norm_2.weight",
        "layers.{}.o": MPT_BLOCK + "norm_attn_norm.attn.out_proj.weight",
        "layers.{}.router": MPT_BLOCK + "ffn.router.layer.weight",
    },
    packs=(
        fused(QKV, MPT_BLOCK + "norm_attn_norm.attn.Wqkv.weight", rows_of_heads),
        *(
            _rows_of_experts(ours, f"{MPT_BLOCK}ffn.experts.mlp.{theirs}")
            for ours, theirs in (("gate", "w1"), ("up", "v1"), ("down", "w2"))
        ),
    ),
    harmless=re.compile(r".*rotary_emb\.inv_freq"),
    prefix="transformer.",
)
