"""Falcon: one key head, or groups of them; attention and feed-forward side by side."""

import re

from ...transformer import Config
from .conventions import read_activation, write_activation
from .gpt import LAYER_NORM, PARTS, of_layers
from .layouts import of_groups, renamed
from .positions import read_rope, whole_heads, write_rope
from .tables import Family, Fields, Json, refuse

BLOCK = "transformer.h.{}."


def _read_falcon(fields: Fields) -> dict[str, Json]:
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    new, side = (
        fields.flag("new_decoder_architecture", False),
        fields.flag("parallel_attn", True),
    )
    one, kv_heads = fields.flag("multi_query", True), fields.whole("num_kv_heads", heads)
    grouped = new or not one
    kv_heads = kv_heads if grouped else 1
    if not new and grouped and kv_heads != heads:
        refuse(fields.place("num_kv_heads"), f"num_attention_heads = {heads}", kv_heads)
    norms = fields.whole("num_ln_in_parallel_attn", 2 if new else 1)
    if (new and not side) or norms > (2 if new else 1):
        place = fields.place("parallel_attn" if not side else "num_ln_in_parallel_attn")
        refuse(place, "as in the published models", side if not side else norms)
    biased, context = (
        fields.flag("bias", False),
        fields.whole("max_position_embeddings", 2048),
    )
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": width // heads,
        "feed_forward": fields.whole("ffn_hidden_size", 4 * width),
        "context": context,
        **whole_heads(read_rope(fields, context)),
        "activation": read_activation(fields, "gelu", "activation"),
        "norm_epsilon": fields.positive("layer_norm_epsilon", 1e-5),
        "parallel": side,
        "shared_norm": side and norms == 1,
        "qkv_bias": biased,
        "output_bias": biased,
        "feed_forward_bias": biased,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_falcon(config: Config) -> dict[str, object]:
    plain = config.kv_heads in (1, config.heads) and (config.shared_norm or not config.parallel)
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "ffn_hidden_size": config.feed_forward,
        "max_position_embeddings": config.context,
        **write_rope(config),
        "activation": write_activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "new_decoder_architecture": not plain,
        "multi_query": config.kv_heads == 1,
        "parallel_attn": config.parallel,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if not plain else None,
        "bias": config.output_bias,
        "alibi": False,
        "tie_word_embeddings": config.tied,
    }


FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    _read_falcon,
    _write_falcon,
    {
        "embedding": "transformer.word_embeddings.weight",
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
    packs=(
        *(
            of_groups(
                [f"layers.{{}}.{leaf}{ours}" for leaf in "qkv"],
                f"{BLOCK}self_attention.query_key_value.{theirs}",
            )
            for theirs, ours in PARTS
        ),
        *(
            renamed(
                f"layers.{{}}.{leaf}_norm{ours}",
                f"{BLOCK}{name}.{theirs}",
                lambda config: config.parallel and not config.shared_norm,
            )
            for leaf, name in (("attention", "ln_attn"), ("feed_forward", "ln_mlp"))
            for theirs, ours in PARTS
        ),
    ),
    neutral={"alibi": (False,)},
    harmless=re.compile(r"(transformer\.)?h\.\d+\.self_attention\.rotary_emb\.inv_freq"),
    prefix="transformer.",
)
