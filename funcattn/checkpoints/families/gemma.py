"""Gemma 1, 2 and 3, and VaultGemma: embeddings times sqrt(E), norm weights around 0, GeGLU.

In 2 and 3 norms before and after attention and feed-forward; soft caps (2); layers with a window
and another rotary base (3). VaultGemma is 2 with norms before alone. Norm weights are stored minus
1, and are so here too (`Config.norm_offset`), bit for bit.
"""

from ...transformer import Config
from .conventions import (
    TENSORS,
    read_activation,
    read_sizes,
    read_windows,
    write_activation,
    write_sizes,
    write_windows,
)
from .positions import read_rope, read_two_bases, whole_heads, write_rope, write_two_bases
from .tables import Family, Fields, Json

AROUND = {
    "layers.{}.attention_after_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.{}.feed_forward_after_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def read_gemma_sizes(fields: Fields, context: int, heads: int, name: str) -> dict[str, Json]:
    """What all of Gemma spell alike; `name` is that of the activation."""
    sizes = read_sizes(fields, context=context, kv_heads=heads, head_size=256)
    biased = fields.flag("attention_bias", False)
    return {
        **sizes,
        "activation": read_activation(fields, "gelu_pytorch_tanh", name),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-6),
        "norm_offset": 1.0,
        "embedding_scale": sizes["width"] ** 0.5,
        "tied": fields.flag("tie_word_embeddings", True),
        "qkv_bias": biased,
        "output_bias": biased,
    }


def write_gemma_sizes(config: Config, name: str) -> dict[str, object]:
    """The same, written."""
    return {
        **write_sizes(config),
        name: write_activation(config),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.output_bias,
    }


def _read_gemma(fields: Fields) -> dict[str, Json]:
    sizes = read_gemma_sizes(fields, 8192, 16, "hidden_act")
    # The first releases have "gelu" and mean the tanh form, as transformers assumes.
    if fields.get("hidden_act") == "gelu":
        sizes["activation"] = "gelu_tanh"
    return {**sizes, **whole_heads(read_rope(fields, sizes["context"]))}


def _write_gemma(config: Config) -> dict[str, object]:
    return {**write_gemma_sizes(config, "hidden_act"), **write_rope(config)}


def read_cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A soft cap: null is None, an absent field is the default."""
    return fields.positive(name, None if fields.says(name) else default)


def _read_around(fields: Fields) -> dict[str, Json]:
    return {
        "attention_scale": fields.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        "norm_placement": "around",
    }


def _write_caps(config: Config) -> dict[str, object]:
    scalar = config.scale**-2
    return {
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "query_pre_attn_scalar": round(scalar)
        if abs(scalar - round(scalar)) < 1e-6 * scalar
        else scalar,
    }


def _read_gemma2(fields: Fields) -> dict[str, Json]:
    sizes = read_gemma_sizes(fields, 8192, 4, "hidden_activation")
    fields.get("hidden_act")
    window, layers = fields.whole("sliding_window", 4096), sizes["layers"]
    windows = read_windows(fields, window, layers, [bool((i + 1) % 2) for i in range(layers)])
    return {
        **sizes,
        **_read_around(fields),
        "attention_cap": read_cap(fields, "attn_logit_softcapping", 50.0),
        "logit_cap": read_cap(fields, "final_logit_softcapping", 30.0),
        **windows,
        **whole_heads(read_rope(fields, sizes["context"])),
    }


def _write_gemma2(config: Config) -> dict[str, object]:
    return {
        **write_gemma_sizes(config, "hidden_activation"),
        **write_rope(config),
        **_write_caps(config),
        **write_windows(config),
    }


def _read_gemma3(fields: Fields) -> dict[str, Json]:
    sizes = read_gemma_sizes(fields, 131072, 4, "hidden_activation")
    fields.get("hidden_act")
    window, layers = fields.whole("sliding_window", 4096), sizes["layers"]
    every = fields.whole("sliding_window_pattern", 6)
    windows = read_windows(fields, window, layers, [bool((i + 1) % every) for i in range(layers)])
    bases = fields.get("rope_theta", 1e6), fields.get("rope_local_base_freq", 1e4)
    return {
        **sizes,
        **_read_around(fields),
        # a cap of attention is kept in its file and never applied
        "logit_cap": read_cap(fields, "final_logit_softcapping", None),
        **windows,
        **read_two_bases(fields, sizes["context"], bases, windows["window"] is not None),
        "head_norm": "rms",
    }


def _write_gemma3(config: Config) -> dict[str, object]:
    return {
        **write_gemma_sizes(config, "hidden_activation"),
        **write_two_bases(config),
        **_write_caps(config),
        **write_windows(config),
    }


def _read_vaultgemma(fields: Fields) -> dict[str, Json]:
    return {**_read_gemma2(fields), "norm_placement": "before"}


GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma, TENSORS)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2, {**TENSORS, **AROUND})
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _read_gemma3,
    _write_gemma3,
    {**TENSORS, **AROUND},
    body="Gemma3TextModel",
)
VAULTGEMMA = Family(
    "vaultgemma",
    "VaultGemmaForCausalLM",
    _read_vaultgemma,
    _write_gemma2,
    {**TENSORS, "layers.{}.feed_forward_norm": AROUND["layers.{}.feed_forward_norm"]},
)
