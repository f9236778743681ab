"""Families that fuse, parallelize or turn otherwise.

phi3         q, k, v in one matrix, gate and up in one; longrope
cohere       attention and feed-forward side by side behind one layer norm; angles on
             neighbouring features
cohere2      the same, where layers without a window do not turn
stablelm     layer norms, part of each head turns
starcoder2   a plain feed-forward, biases, a window
"""

import re
from dataclasses import replace

from ...transformer import Config
from .conventions import (
    TENSORS,
    read_activation,
    read_sizes,
    read_windows,
    turning_where_local,
    write_activation,
    write_sizes,
    write_windows,
)
from .layouts import fused, rotated, stacked
from .positions import ORIGINAL, partial_heads, read_rope, whole_heads, write_rope
from .tables import Family, Fields, Json

LAYER = "model.layers.{}."


def rows_of_heads(config: Config) -> list[int]:
    """Rows of q, k and v."""
    return [n * config.head_size for n in (config.heads, config.kv_heads, config.kv_heads)]


def _read_phi3(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=4096)
    renamed = {"su": "longrope", "yarn": "longrope"}  # as transformers takes them
    rope = read_rope(fields, sizes["context"], share=1.0, renamed=renamed, original=4096)
    window = fields.whole("sliding_window", None)
    return {
        **sizes,
        **partial_heads(rope, sizes["head_size"]),
        "window": window,
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-5),
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _read_phi4_multimodal(fields: Fields) -> dict[str, Json]:
    """Its text; that of images and sound, and their LoRA, are left out."""
    if fields.get("num_key_value_heads") is None and not fields.says("num_key_value_heads"):
        fields.values = {**fields.values, "num_key_value_heads": 8}
    fields.values = {"max_position_embeddings": 131072, **fields.values}
    for name in ("vision_config", "audio_config"):
        fields.get(name)
    return _read_phi3(fields)


def _write_phi3(config: Config) -> dict[str, object]:
    scaling = config.rope_scaling
    return {
        **write_sizes(config),
        **write_rope(config),
        ORIGINAL: config.context if scaling is None else scaling.context,
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "sliding_window": config.window,
    }


def read_cohere(fields: Fields, base: float = 500000.0) -> dict[str, Json]:
    """The fields of Cohere; `base` where the file says none."""
    sizes = read_sizes(fields, context=8192)
    biased = fields.flag("attention_bias", False)
    return {
        **sizes,
        **whole_heads(read_rope(fields, sizes["context"], base=base)),
        "activation": read_activation(fields),
        "norm": "layer",
        "norm_epsilon": fields.positive("layer_norm_eps", 1e-5),
        "parallel": True,
        "shared_norm": True,
        "head_norm": "layer" if fields.flag("use_qk_norm", False) else "none",
        "qkv_bias": biased,
        "output_bias": biased,
        "logit_scale": fields.positive("logit_scale", 0.0625),
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_cohere(config: Config) -> dict[str, object]:
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_epsilon,
        "use_qk_norm": config.head_norm == "layer",
        "attention_bias": config.output_bias,
        "logit_scale": config.logit_scale,
        "tie_word_embeddings": config.tied,
    }


def _read_cohere2(fields: Fields) -> dict[str, Json]:
    found = read_cohere(fields, base=10000.0)
    layers, every = found["layers"], fields.whole("sliding_window_pattern", 4)
    local = [bool((i + 1) % every) for i in range(layers)]
    windows = read_windows(fields, fields.whole("sliding_window", 4096), layers, local)
    turning = turning_where_local(windows, layers)
    return {**found, **windows, "rotary_layers": turning, "head_norm": "none"}


def _write_cohere2(config: Config) -> dict[str, object]:
    return {**_write_cohere(config), **write_windows(config), "use_qk_norm": False}


def _read_stablelm(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=4096, kv_heads=32)
    rope = read_rope(fields, sizes["context"], share=0.25)
    parallel = fields.flag("use_parallel_residual", False)
    return {
        **sizes,
        **partial_heads(rope, sizes["head_size"]),
        "activation": read_activation(fields),
        "norm": "layer",
        "norm_bias": True,
        "norm_epsilon": fields.positive("layer_norm_eps", 1e-5),
        "parallel": parallel,
        "shared_norm": parallel,
        "head_norm": "layer" if fields.flag("qk_layernorm", False) else "none",
        "qkv_bias": fields.flag("use_qkv_bias", False),
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _write_stablelm(config: Config) -> dict[str, object]:
    rope = write_rope(config)
    rope["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return {
        **write_sizes(config),
        **rope,
        "partial_rotary_factor": rope["rope_parameters"]["partial_rotary_factor"],
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_epsilon,
        "use_parallel_residual": config.parallel,
        "qk_layernorm": config.head_norm == "layer",
        "use_qkv_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
    }


def _read_starcoder2(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=4096, kv_heads=2)
    biased, window = fields.flag("use_bias", True), fields.whole("sliding_window", None)
    return {
        **sizes,
        **whole_heads(read_rope(fields, sizes["context"])),
        "window": window,
        "activation": read_activation(fields, "gelu_pytorch_tanh"),
        "gated": False,
        "norm": "layer",
        "norm_bias": True,
        "norm_epsilon": fields.positive("norm_epsilon", 1e-5),
        "qkv_bias": biased,
        "output_bias": biased,
        "feed_forward_bias": biased,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _write_starcoder2(config: Config) -> dict[str, object]:
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "norm_epsilon": config.norm_epsilon,
        "sliding_window": config.window,
        "use_bias": config.output_bias,
        "tie_word_embeddings": config.tied,
    }


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _read_phi3,
    _write_phi3,
    TENSORS,
    packs=(
        fused(
            [f"layers.{{}}.{leaf}" for leaf in "qkv"],
            LAYER + "self_attn.qkv_proj.weight",
            rows_of_heads,
        ),
        fused(
            [f"layers.{{}}.{leaf}" for leaf in ("gate", "up")],
            LAYER + "mlp.gate_up_proj.weight",
            lambda config: [config.feed_forward] * 2,
        ),
    ),
)
PHI4_MULTIMODAL = replace(
    PHI3,
    name="phi4_multimodal",
    architecture="Phi4MultimodalForCausalLM",
    read=_read_phi4_multimodal,
    harmless=re.compile(r"model\.embed_tokens_extend\..*"),
)
COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    read_cohere,
    _write_cohere,
    TENSORS,
    packs=tuple(
        rotated(f"layers.{{}}.{leaf}{ours}", LAYER + f"self_attn.{leaf}_{theirs}")
        for leaf in "qk"
        for ours, theirs in (("", "proj.weight"), ("_bias", "proj.bias"), ("_norm", "norm.weight"))
    ),
)
COHERE2 = Family(
    "cohere2", "Cohere2ForCausalLM", _read_cohere2, _write_cohere2, TENSORS, packs=COHERE.packs
)
STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    _read_stablelm,
    _write_stablelm,
    TENSORS,
    packs=tuple(
        stacked(
            f"layers.{{}}.{x}_norm",
            f"{LAYER}self_attn.{x}_layernorm.norms.{{expert}}.weight",
            experts=False,
        )
        for x in "qk"
    ),
)
STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    _read_starcoder2,
    _write_starcoder2,
    {
        **TENSORS,
        "layers.{}.up": LAYER + "mlp.c_fc.weight",
        "layers.{}.up_bias": LAYER + "mlp.c_fc.bias",
        "layers.{}.down": LAYER + "mlp.c_proj.weight",
        "layers.{}.down_bias": LAYER + "mlp.c_proj.bias",
    },
    neutral={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
)
