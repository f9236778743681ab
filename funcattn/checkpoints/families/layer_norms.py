"""Dense families with layer norms: angles that turn, or a table of sines.

persimmon            norms of heads with a bias
gpt_neox_japanese    a bias in the last layer alone
ctrl                 sines, a bias of the head
modernbert-decoder   norms of embedding and head, windows with another rotary base
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ...transformer import Config
from .conventions import (
    read_activation,
    read_sizes,
    read_windows,
    write_activation,
    write_sizes,
    write_windows,
)
from .gpt import ALIASES, LAYER_NORM, PARTS, of_layers
from .layouts import fused, implied, of_groups, placed
from .positions import partial_heads, read_rope, read_two_bases, write_rope, write_two_bases
from .tables import Family, Fields, Json, refuse

LAYER, NEOX, BLOCK = "model.layers.{}.", "gpt_neox_japanese.layers.{}.", "transformer.h.{}."


def _read_persimmon(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=16384)
    fields.get("num_key_value_heads")  # its class reads neither of them
    fields.get("head_dim")
    heads, width = sizes["heads"], sizes["width"]
    size = width // heads
    return {
        **LAYER_NORM,
        **sizes,
        "kv_heads": heads,
        "head_size": size,
        **partial_heads(read_rope(fields, sizes["context"], share=0.5), size),
        "activation": read_activation(fields, "relu2"),
        "norm_epsilon": fields.positive("layer_norm_eps", 1e-5),
        "head_norm": "layer_bias" if fields.flag("qk_layernorm", True) else "none",
        "qkv_bias": True,
        "output_bias": True,
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _write_persimmon(config: Config) -> dict[str, object]:
    rope = write_rope(config)
    share = rope["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return {
        **write_sizes(config),
        **rope,
        "partial_rotary_factor": share,
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_epsilon,
        "qk_layernorm": config.head_norm == "layer_bias",
        "tie_word_embeddings": config.tied,
    }


def _read_japanese(fields: Fields) -> dict[str, Json]:
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    context, size = fields.whole("max_position_embeddings", 2048), width // heads
    rope = read_rope(fields, context, names=("rotary_emb_base", "rotary_pct"))
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": size,
        "feed_forward": width * fields.whole("intermediate_multiple_size", 4),
        "context": context,
        **partial_heads(rope, size),
        "activation": read_activation(fields, "gelu"),
        "norm_epsilon": fields.positive("layer_norm_eps", 1e-5),
        "output_bias": True,
        "feed_forward_bias": False,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_japanese(config: Config) -> dict[str, object]:
    rope = write_rope(config)
    share = rope.pop("partial_rotary_factor", 1.0)
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_multiple_size": config.feed_forward // config.width,
        "max_position_embeddings": config.context,
        **rope,
        "rotary_pct": share,
        "rotary_emb_base": config.rope_base,
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


def _zeros(config: Config, x: Tensor, path: str) -> Tensor:
    """The bias of x, in a layer without."""
    return x.new_zeros(x.shape[0])


def _is_last(config: Config, layer: int) -> bool:
    return layer == config.layers - 1


def _read_ctrl(fields: Fields) -> dict[str, Json]:
    for alias, name in ALIASES.items():
        if fields.get(alias) not in (None, fields.get(name)):
            refuse(fields.place(alias), f"absent, or what {name} is", fields.get(alias))
    width, heads = fields.whole("n_embd"), fields.whole("n_head")
    epsilon = fields.positive("layer_norm_epsilon", 1e-6)
    if epsilon != 1e-6:  # that of its layers, whatever is said
        refuse(fields.place("layer_norm_epsilon"), 1e-6, epsilon)
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "feed_forward": fields.whole("dff", 8192),
        "context": fields.whole("n_positions", 256),
        "positions": "learned",
        "activation": "relu",
        "norm_epsilon": epsilon,
        "embedding_scale": width**0.5,
        "qkv_bias": True,
        "output_bias": True,
        "head_bias": True,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_ctrl(config: Config) -> dict[str, object]:
    return {
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "dff": config.feed_forward,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


def _sines(config: Config, like: Tensor, path: str) -> Tensor:
    """Positions (context, E) of CTRL: sines of t 10000^(-2 i / E), then cosines.

    Source: Vaswani et al., Attention is all you need, arXiv:1706.03762, section 3.5.
    """
    each = torch.arange(config.width, device=like.device).float() // 2 * 2 / config.width
    angles = torch.arange(config.context, device=like.device).float().unsqueeze(1)
    angles = angles * (1 / torch.pow(10000, each))
    return torch.cat([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 1).to(like.dtype)


def _read_modernbert(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=8192)
    for name in ("num_key_value_heads", "head_dim", "cls_token_id", "initializer_cutoff_factor"):
        fields.get(name)
    layers, size = sizes["layers"], sizes["width"] // sizes["heads"]
    biased, every = (
        fields.flag("attention_bias", False),
        fields.whole("global_attn_every_n_layers", 3),
    )
    near = fields.whole("local_attention", None if fields.says("local_attention") else 128)
    windows = read_windows(
        fields,
        near and near // 2,
        layers,
        [bool(i % every) and near is not None for i in range(layers)],
    )
    if fields.get("sliding_window") not in (None, near and near // 2):
        got = fields.get("sliding_window")
        refuse(fields.place("sliding_window"), "absent, or half of local_attention", got)
    bases = fields.get("global_rope_theta", 160000.0), fields.get("local_rope_theta", 10000.0)
    if fields.get("rope_scaling"):
        refuse(fields.place("rope_scaling"), "absent", fields.get("rope_scaling"))
    act = read_activation(fields, "gelu", "hidden_activation")
    if read_activation(fields, "gelu", "classifier_activation") != act:
        got = fields.get("classifier_activation")
        refuse(fields.place("classifier_activation"), "what hidden_activation is", got)
    norm_bias = fields.flag("norm_bias", False)
    if fields.flag("classifier_bias", False) != norm_bias:
        refuse(fields.place("classifier_bias"), "what norm_bias is", not norm_bias)
    return {
        **sizes,
        "kv_heads": sizes["heads"],
        "head_size": size,
        **read_two_bases(fields, sizes["context"], bases, windows["window"] is not None),
        **windows,
        "activation": act,
        "norm": "layer",
        "norm_bias": norm_bias,
        "norm_epsilon": fields.positive("norm_eps", 1e-5),
        "first_norm": False,
        "embedding_norm": True,
        "head_transform": True,
        "head_bias": fields.flag("decoder_bias", True),
        "qkv_bias": biased,
        "output_bias": biased,
        "feed_forward_bias": fields.flag("mlp_bias", False),
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_modernbert(config: Config) -> dict[str, object]:
    sizes = write_sizes(config)
    windows = write_windows(config)
    del sizes["num_key_value_heads"], sizes["head_dim"], windows["sliding_window"]
    return {
        **sizes,
        **windows,
        **write_two_bases(config),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), 0),  # its class takes no null
        "local_attention": config.window and 2 * config.window,
        "hidden_activation": write_activation(config),
        "classifier_activation": write_activation(config),
        "norm_eps": config.norm_epsilon,
        "norm_bias": config.norm_bias,
        "classifier_bias": config.norm_bias,
        "decoder_bias": config.head_bias,
        "attention_bias": config.output_bias,
        "mlp_bias": config.feed_forward_bias,
        "tie_word_embeddings": config.tied,
    }


PERSIMMON = Family(
    "persimmon",
    "PersimmonForCausalLM",
    _read_persimmon,
    _write_persimmon,
    {
        "embedding": "model.embed_tokens.weight",
        "norm": "model.final_layernorm.weight",
        "norm_bias": "model.final_layernorm.bias",
        "head": "lm_head.weight",
        **of_layers(
            (
                ("attention_norm", "input_layernorm"),
                ("feed_forward_norm", "post_attention_layernorm"),
                ("o", "self_attn.dense"),
                ("up", "mlp.dense_h_to_4h"),
                ("down", "mlp.dense_4h_to_h"),
                ("q_norm", "self_attn.q_layernorm"),
                ("k_norm", "self_attn.k_layernorm"),
            ),
            LAYER,
        ),
    },
    packs=tuple(
        of_groups(
            [f"layers.{{}}.{leaf}{ours}" for leaf in "qkv"],
            f"{LAYER}self_attn.query_key_value.{theirs}",
        )
        for theirs, ours in PARTS
    ),
)
GPT_NEOX_JAPANESE = Family(
    "gpt_neox_japanese",
    "GPTNeoXJapaneseForCausalLM",
    _read_japanese,
    _write_japanese,
    {
        "embedding": "gpt_neox_japanese.embed_in.weight",
        "norm": "gpt_neox_japanese.final_layer_norm.weight",
        "norm_bias": "gpt_neox_japanese.final_layer_norm.bias",
        "head": "embed_out.weight",
        **of_layers(
            (
                ("attention_norm", "input_layernorm"),
                ("feed_forward_norm", "post_attention_layernorm"),
                ("o", "attention.dense"),
                ("up", "mlp.dense_h_to_4h"),
                ("down", "mlp.dense_4h_to_h"),
            ),
            NEOX,
        ),
    },
    packs=(
        of_groups(
            [f"layers.{{}}.{leaf}" for leaf in "qkv"], NEOX + "attention.query_key_value.weight"
        ),
        placed("layers.{}.o_bias", NEOX + "attention.dense_bias", _is_last),
        replace(
            implied(["layers.{}.o", "layers.{}.o_bias"], NEOX + "attention.dense.weight", _zeros),
            applies=lambda config, layer: not _is_last(config, layer),
        ),
    ),
    harmless=re.compile(r"gpt_neox_japanese\.layers\.\d+\.attention\.rotary_emb\.inv_freq"),
    prefix="gpt_neox_japanese.",
)
CTRL = Family(
    "ctrl",
    "CTRLLMHeadModel",
    _read_ctrl,
    _write_ctrl,
    {
        "embedding": "transformer.w.weight",
        "norm": "transformer.layernorm.weight",
        "norm_bias": "transformer.layernorm.bias",
        "head": "lm_head.weight",
        "head_bias": "lm_head.bias",
        **of_layers(
            (
                ("attention_norm", "layernorm1"),
                ("feed_forward_norm", "layernorm2"),
                *((x, f"multi_head_attention.W{x}") for x in "qkv"),
                ("o", "multi_head_attention.dense"),
                ("up", "ffn.0"),
                ("down", "ffn.2"),
            ),
            BLOCK,
        ),
    },
    packs=(implied(["embedding", "positions"], "transformer.w.weight", _sines),),
    harmless=re.compile(r"transformer\.pos_encoding"),
    prefix="transformer.",
)
MODERNBERT = Family(
    "modernbert-decoder",
    "ModernBertDecoderForCausalLM",
    _read_modernbert,
    _write_modernbert,
    {
        "embedding": "model.embeddings.tok_embeddings.weight",
        "head": "decoder.weight",
        "head_bias": "decoder.bias",
        **{
            f"{ours}{bias}": f"{theirs}.{kind}"
            for ours, theirs in (
                ("embedding_norm", "model.embeddings.norm"),
                ("norm", "model.final_norm"),
                ("transform", "lm_head.dense"),
                ("transform_norm", "lm_head.norm"),
            )
            for kind, bias in PARTS
        },
        **of_layers(
            (
                ("attention_norm", "attn_norm"),
                ("feed_forward_norm", "mlp_norm"),
                *((x, f"attn.{x}_proj") for x in "qkv"),
                ("o", "attn.Wo"),
                ("down", "mlp.Wo"),
            ),
            LAYER,
        ),
    },
    packs=tuple(
        fused(
            [f"layers.{{}}.{leaf}{ours}" for leaf in ("gate", "up")],
            f"{LAYER}mlp.Wi.{theirs}",
            lambda config: [config.feed_forward] * 2,
        )
        for theirs, ours in PARTS
    ),
)
