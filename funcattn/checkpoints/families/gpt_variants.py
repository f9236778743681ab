"""Families beside GPT-2 and GPT-NeoX: layer norms with biases, a plain feed-forward.

gpt_bigcode       GPT-2 with one key head and matrices as (out, in)
openai-gpt        GPT-2 with norms after the sum
gpt_neo           attention that is not scaled, windows in every second layer
opt biogpt xglm   positions behind two rows that are not used; in xglm a table of sines
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from ...transformer import Config
from .bert import after_the_sum
from .conventions import read_activation, write_activation
from .gpt import GPT2, LAYER_NORM, PARTS, of_layers
from .layouts import implied, of_groups, sliced
from .tables import Family, Fields, Json, refuse

BLOCK = "transformer.h.{}."
NORM_EPSILON = 1e-5  # of torch.nn.LayerNorm


def _read_openai(fields: Fields) -> dict[str, Json]:
    named = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}
    act = fields.choice("afn", named, "gelu")
    fields.values = {"n_positions": 512, **fields.values, "activation_function": act}
    return {**GPT2.read(fields), "norm_placement": "residual", "first_norm": False}


def _write_openai(config: Config) -> dict[str, object]:
    found = GPT2.write(config)
    names = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}
    del found["n_inner"], found["activation_function"], found["scale_attn_weights"]
    return {**found, "afn": names.get(config.activation)}


def _read_bigcode(fields: Fields) -> dict[str, Json]:
    fields.values = {"activation_function": "gelu_pytorch_tanh", **fields.values}
    found = GPT2.read(fields)
    return {**found, "kv_heads": 1 if fields.flag("multi_query", True) else found["heads"]}


def _write_bigcode(config: Config) -> dict[str, object]:
    return {**GPT2.write(config), "multi_query": config.kv_heads == 1}


def _read_neo(fields: Fields) -> dict[str, Json]:
    width, heads = fields.whole("hidden_size"), fields.whole("num_heads")
    layers, place = fields.whole("num_layers"), fields.place("attention_types")
    kinds: list[Json] = []
    for item in fields.items("attention_types") or [[["global", "local"], 12]]:
        known = isinstance(item, list) and len(item) == 2 and isinstance(item[0], list)
        if not known or not isinstance(item[1], int) or item[1] * len(item[0]) > layers:
            refuse(place, "a list of [kinds, repetitions], global or local", item)
        kinds += item[0] * item[1]
    if len(kinds) != layers or any(kind not in ("global", "local") for kind in kinds):
        refuse(place, f"global or local for each of the {layers} layers", kinds)
    local = tuple(kind == "local" for kind in kinds)
    for alias, name in (
        ("num_attention_heads", "num_heads"),
        ("num_hidden_layers", "num_layers"),
    ):
        if fields.get(alias) not in (None, fields.get(name)):
            refuse(fields.place(alias), f"absent, or what {name} is", fields.get(alias))
    fields.get("attention_layers")  # follows from attention_types
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "feed_forward": fields.whole("intermediate_size", 4 * width),
        "context": fields.whole("max_position_embeddings", 2048),
        "positions": "learned",
        "activation": read_activation(fields, "gelu_new", "activation_function"),
        "norm_epsilon": fields.positive("layer_norm_epsilon", 1e-5),
        "attention_scale": 1.0,
        "window": fields.whole("window_size", 256) if any(local) else None,
        "window_layers": () if all(local) or not any(local) else local,
        "output_bias": True,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_neo(config: Config) -> dict[str, object]:
    kinds = [
        "global" if config.layer_spec(i).window is None else "local" for i in range(config.layers)
    ]
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "intermediate_size": config.feed_forward,
        "max_position_embeddings": config.context,
        "activation_function": write_activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "attention_types": [[kinds, 1]],
        "window_size": config.window or 256,
        "tie_word_embeddings": config.tied,
    }


def _read_decoder(
    fields: Fields, names: dict[str, str], context: int, activation: str
) -> dict[str, Json]:
    """What OPT, BioGPT and XGLM have in common; `names` are theirs of the sizes."""
    width, heads = fields.whole(names["width"]), fields.whole(names["heads"])
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole(names["layers"]),
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "feed_forward": fields.whole(names["feed_forward"]),
        "context": fields.whole("max_position_embeddings", context),
        "positions": "learned",
        "activation": read_activation(fields, activation, names["activation"]),
        "norm_epsilon": NORM_EPSILON,
        "qkv_bias": True,
        "output_bias": True,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_decoder(config: Config, names: dict[str, str]) -> dict[str, object]:
    found = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    return {
        **found,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        names["activation"]: write_activation(config),
        "tie_word_embeddings": config.tied,
    }


OPT_NAMES = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "feed_forward": "ffn_dim",
    "activation": "activation_function",
}
BIOGPT_NAMES = {**OPT_NAMES, "feed_forward": "intermediate_size", "activation": "hidden_act"}
XGLM_NAMES = {
    **OPT_NAMES,
    "width": "d_model",
    "heads": "attention_heads",
    "layers": "num_layers",
}


def _read_opt(fields: Fields) -> dict[str, Json]:
    found = _read_decoder(fields, OPT_NAMES, 2048, "relu")
    size = fields.whole("word_embed_proj_dim", found["width"])
    after = not fields.flag("do_layer_norm_before", True)
    biased = fields.flag("enable_bias", True)
    return {
        **found,
        "embedding_size": 0 if size == found["width"] else size,
        **({"norm_placement": "residual", "first_norm": False} if after else {}),
        "qkv_bias": biased,
        "output_bias": biased,
        "feed_forward_bias": biased,
    }


def _write_opt(config: Config) -> dict[str, object]:
    return {
        **_write_decoder(config, OPT_NAMES),
        "enable_bias": config.output_bias,
        "word_embed_proj_dim": config.embedding_size or config.width,
        "do_layer_norm_before": config.norm_placement != "residual",
    }


def _after(config: Config, layer: int) -> bool:
    return config.norm_placement == "residual"


def _read_scaled(fields: Fields, found: dict[str, Json]) -> dict[str, Json]:
    scaled = fields.flag("scale_embedding", True)
    return {**found, "embedding_scale": found["width"] ** 0.5 if scaled else 1.0}


def _read_biogpt(fields: Fields) -> dict[str, Json]:
    return _read_scaled(fields, _read_decoder(fields, BIOGPT_NAMES, 1024, "gelu"))


def _write_biogpt(config: Config) -> dict[str, object]:
    return {
        **_write_decoder(config, BIOGPT_NAMES),
        "scale_embedding": config.embedding_scale != 1.0,
    }


def _read_xglm(fields: Fields) -> dict[str, Json]:
    if fields.get("pad_token_id", 1) not in (0, 1):  # its row of the table is zero
        refuse(fields.place("pad_token_id"), "0 or 1", fields.get("pad_token_id"))
    return _read_scaled(fields, _read_decoder(fields, XGLM_NAMES, 2048, "gelu"))


def _write_xglm(config: Config) -> dict[str, object]:
    return {
        **_write_decoder(config, XGLM_NAMES),
        "scale_embedding": config.embedding_scale != 1.0,
    }


def _sines(config: Config, like: Tensor, path: str) -> Tensor:
    """Positions (context, E) of XGLM: sin and cos of (t + 2) 10000^(-i / (E / 2 - 1)).

    Source: Vaswani et al., Attention is all you need, arXiv:1706.03762, section 3.5, in the order
    of tensor2tensor.
    """
    half = config.width // 2
    rate = math.log(10000) / (half - 1)
    rates = torch.exp(torch.arange(half, device=like.device).float() * -rate)
    turns = torch.arange(2, config.context + 2, device=like.device).float().unsqueeze(1) * rates
    table = torch.cat([turns.sin(), turns.cos()], 1)
    return torch.nn.functional.pad(table, (0, config.width % 2)).to(like.dtype)


DECODER_LAYER = (
    *((leaf, f"self_attn.{leaf}_proj") for leaf in "qkv"),
    ("o", "self_attn.out_proj"),
    ("attention_norm", "self_attn_layer_norm"),
    ("feed_forward_norm", "final_layer_norm"),
    ("up", "fc1"),
    ("down", "fc2"),
)


def _decoder(prefix: str, norm: str, head: str) -> dict[str, str]:
    return {
        "embedding": f"{prefix}embed_tokens.weight",
        "norm": f"{prefix}{norm}.weight",
        "norm_bias": f"{prefix}{norm}.bias",
        "head": f"{head}.weight",
        **of_layers(DECODER_LAYER, prefix + "layers.{}."),
    }


GPT_BIGCODE = Family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    _read_bigcode,
    _write_bigcode,
    {
        **GPT2.tensors,
        "layers.{}.o": BLOCK + "attn.c_proj.weight",
        "layers.{}.up": BLOCK + "mlp.c_fc.weight",
        "layers.{}.down": BLOCK + "mlp.c_proj.weight",
    },
    packs=tuple(
        of_groups([f"layers.{{}}.{leaf}{ours}" for leaf in "qkv"], f"{BLOCK}attn.c_attn.{theirs}")
        for theirs, ours in PARTS
    ),
    harmless=GPT2.harmless,
    prefix="transformer.",
)
GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    _read_neo,
    _write_neo,
    {
        **GPT2.tensors,
        **of_layers(
            (
                *((leaf, f"attn.attention.{leaf}_proj") for leaf in "qkv"),
                ("o", "attn.attention.out_proj"),
                ("up", "mlp.c_fc"),
                ("down", "mlp.c_proj"),
            ),
            BLOCK,
        ),
    },
    harmless=re.compile(r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)"),
    prefix="transformer.",
)
OPENAI_GPT = Family(
    "openai-gpt",
    "OpenAIGPTLMHeadModel",
    _read_openai,
    _write_openai,
    {
        **GPT2.tensors,
        "embedding": "transformer.tokens_embed.weight",
        "positions": "transformer.positions_embed.weight",
    },
    packs=(*GPT2.packs, *after_the_sum("", BLOCK + "ln_1", BLOCK + "ln_2")),
    harmless=re.compile(r"(transformer\.)?(h\.\d+\.attn\.bias|position_ids)"),
    prefix="transformer.",
)
OPT = Family(
    "opt",
    "OPTForCausalLM",
    _read_opt,
    _write_opt,
    {
        **_decoder("model.decoder.", "final_layer_norm", "lm_head"),
        "embedding_in": "model.decoder.project_in.weight",
        "embedding_out": "model.decoder.project_out.weight",
    },
    packs=(
        sliced("positions", "model.decoder.embed_positions.weight", 2),
        *(  # of OPT-350m
            replace(
                pack,
                applies=lambda config, layer, pack=pack: (
                    _after(config, layer) and pack.applies(config, layer)
                ),
            )
            for pack in after_the_sum(
                "",
                "model.decoder.layers.{}.self_attn_layer_norm",
                "model.decoder.layers.{}.final_layer_norm",
            )
        ),
    ),
    neutral={
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
)
BIOGPT = Family(
    "biogpt",
    "BioGptForCausalLM",
    _read_biogpt,
    _write_biogpt,
    _decoder("biogpt.", "layer_norm", "output_projection"),
    packs=(sliced("positions", "biogpt.embed_positions.weight", 2),),
    prefix="biogpt.",
)
XGLM = Family(
    "xglm",
    "XGLMForCausalLM",
    _read_xglm,
    _write_xglm,
    _decoder("model.", "layer_norm", "lm_head"),
    packs=(implied(["embedding", "positions"], "model.embed_tokens.weight", _sines),),
)
