"""GPT-2 and GPT-NeoX (Pythia): layer norms with biases, a plain feed-forward.

GPT-2 learns its positions and stores matrices as (in, out); GPT-NeoX turns a part of each head, and
runs attention and feed-forward side by side, each behind a norm of its own.
"""

import re
from dataclasses import replace

from ...transformer import Config
from .conventions import read_activation, read_sizes, write_activation, write_sizes
from .layouts import fused, of_groups, transposed
from .positions import partial_heads, read_rope, write_rope
from .tables import Family, Fields, Json, refuse

BLOCK, LAYER = "transformer.h.{}.", "gpt_neox.layers.{}."
PARTS = ("weight", ""), ("bias", "_bias")
LAYER_NORM = {"norm": "layer", "norm_bias": True, "gated": False, "feed_forward_bias": True}


def of_layers(pairs: tuple[tuple[str, str], ...], prefix: str) -> dict[str, str]:
    """path -> name of weights and biases in layers."""
    return {
        f"layers.{{}}.{ours}{bias}": f"{prefix}{theirs}.{kind}"
        for ours, theirs in pairs
        for kind, bias in PARTS
    }


ALIASES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
# of GPT-2 in transformers, where they go first
ALIASES |= {"max_position_embeddings": "n_positions"}


def _read_gpt2(fields: Fields) -> dict[str, Json]:
    for alias, name in ALIASES.items():
        if fields.get(alias) is not None and fields.get(alias) != fields.get(name):
            refuse(
                fields.place(alias),
                f"absent, or what {name} is, {fields.get(name)}",
                fields.get(alias),
            )
    width, heads = fields.whole("n_embd"), fields.whole("n_head")
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "feed_forward": fields.whole("n_inner", 4 * width),
        "context": fields.whole("n_positions", 1024),
        "positions": "learned",
        "activation": read_activation(fields, "gelu_new", "activation_function"),
        "norm_epsilon": fields.positive("layer_norm_epsilon", 1e-5),
        "qkv_bias": True,
        "output_bias": True,
        "attention_scale": None if fields.flag("scale_attn_weights", True) else 1.0,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_gpt2(config: Config) -> dict[str, object]:
    return {
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward,
        "n_positions": config.context,
        "activation_function": write_activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "scale_attn_weights": config.attention_scale is None,
        "tie_word_embeddings": config.tied,
    }


def _read_neox(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=2048)
    rope = read_rope(fields, sizes["context"], share=0.25, names=("rotary_emb_base", "rotary_pct"))
    biased = fields.flag("attention_bias", True)
    return {
        **LAYER_NORM,
        **sizes,
        **partial_heads(rope, sizes["head_size"]),
        "kv_heads": sizes["heads"],
        "activation": read_activation(fields, "gelu"),
        "norm_epsilon": fields.positive("layer_norm_eps", 1e-5),
        "parallel": fields.flag("use_parallel_residual", True),
        "qkv_bias": biased,
        "output_bias": biased,
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _write_neox(config: Config) -> dict[str, object]:
    rope = write_rope(config)
    share = rope["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    sizes = {
        name: value
        for name, value in write_sizes(config).items()
        if name not in ("num_key_value_heads", "head_dim")
    }
    rope.pop("partial_rotary_factor", None)  # which it calls rotary_pct
    return {
        **sizes,
        **rope,
        "rotary_pct": share,
        "rotary_emb_base": config.rope_base,
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_epsilon,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.output_bias,
        "tie_word_embeddings": config.tied,
    }


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _read_gpt2,
    _write_gpt2,
    {
        "embedding": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "norm": "transformer.ln_f.weight",
        "norm_bias": "transformer.ln_f.bias",
        "head": "lm_head.weight",
        **{f"layers.{{}}.attention_norm{ours}": f"{BLOCK}ln_1.{theirs}" for theirs, ours in PARTS},
        **{
            f"layers.{{}}.feed_forward_norm{ours}": f"{BLOCK}ln_2.{theirs}"
            for theirs, ours in PARTS
        },
        "layers.{}.o_bias": BLOCK + "attn.c_proj.bias",
        "layers.{}.up_bias": BLOCK + "mlp.c_fc.bias",
        "layers.{}.down_bias": BLOCK + "mlp.c_proj.bias",
    },
    packs=(
        *(
            fused(
                [f"layers.{{}}.{leaf}{ours}" for leaf in "qkv"],
                f"{BLOCK}attn.c_attn.{theirs}",
                lambda config: [config.width] * 3,
                turned=True,
            )
            for theirs, ours in PARTS
        ),
        transposed("layers.{}.o", BLOCK + "attn.c_proj.weight"),
        transposed("layers.{}.up", BLOCK + "mlp.c_fc.weight"),
        transposed("layers.{}.down", BLOCK + "mlp.c_proj.weight"),
    ),
    neutral={"scale_attn_by_inverse_layer_idx": (False,)},
    harmless=re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
    prefix="transformer.",
)
GPT_SW3 = replace(GPT2, name="gpt-sw3")
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _read_neox,
    _write_neox,
    {
        "embedding": "gpt_neox.embed_in.weight",
        "norm": "gpt_neox.final_layer_norm.weight",
        "norm_bias": "gpt_neox.final_layer_norm.bias",
        "head": "embed_out.weight",
        **{
            f"layers.{{}}.attention_norm{ours}": f"{LAYER}input_layernorm.{theirs}"
            for theirs, ours in PARTS
        },
        **{
            f"layers.{{}}.feed_forward_norm{ours}": f"{LAYER}post_attention_layernorm.{theirs}"
            for theirs, ours in PARTS
        },
        **{f"layers.{{}}.o{ours}": f"{LAYER}attention.dense.{theirs}" for theirs, ours in PARTS},
        **{f"layers.{{}}.up{ours}": f"{LAYER}mlp.dense_h_to_4h.{theirs}" for theirs, ours in PARTS},
        **{
            f"layers.{{}}.down{ours}": f"{LAYER}mlp.dense_4h_to_h.{theirs}"
            for theirs, ours in PARTS
        },
    },
    packs=tuple(
        of_groups(
            [f"layers.{{}}.{leaf}{ours}" for leaf in "qkv"],
            f"{LAYER}attention.query_key_value.{theirs}",
        )
        for theirs, ours in PARTS
    ),
    prefix="gpt_neox.",
    harmless=re.compile(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    ),
)
