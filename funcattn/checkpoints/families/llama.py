"""Llama-like families: RMS norms before attention and a gated feed-forward, rotary positions.

llama      2, 3 and 3.1 and later; SmolLM2 and what else is a LlamaForCausalLM
smollm3    some layers do not turn
mistral    a sliding window
qwen2      biases of q, k, v
qwen3      queries and keys are normalized, heads have a size of their own
granite    multipliers
olmo2      norms after, not before; queries and keys normalized over all heads
"""

from collections.abc import Callable, Mapping

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
from .positions import read_rope, whole_heads, write_rope
from .tables import Family, Fields, Json

AFTER = {
    "layers.{}.attention_after_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward_after_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def read_common(
    fields: Fields,
    *,
    context: int,
    base: float = 10000.0,
    epsilon: float = 1e-6,
    tied: bool = False,
    kv_heads: int | None = None,
    head_size: int | None = None,
    bias: bool = True,
    renamed: Mapping[str, str] | None = None,
) -> dict[str, Json]:
    """The fields common to these families; arguments are the defaults of transformers.

    `bias`: whether attention_bias is a field of the family; `renamed`: as in `read_rope`.
    """
    sizes = read_sizes(fields, context=context, kv_heads=kv_heads, head_size=head_size)
    biased = bias and fields.flag("attention_bias", False)
    return {
        **sizes,
        **whole_heads(read_rope(fields, sizes["context"], base=base, renamed=renamed)),
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", epsilon),
        "tied": fields.flag("tie_word_embeddings", tied),
        "qkv_bias": biased,
        "output_bias": biased,
    }


def write_common(config: Config) -> dict[str, object]:
    """The fields of `read_common`."""
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.output_bias,
    }


def _read_llama(fields: Fields) -> dict[str, Json]:
    return {
        **read_common(fields, context=2048),
        "feed_forward_bias": fields.flag("mlp_bias", False),
    }


def _write_llama(config: Config) -> dict[str, object]:
    return {**write_common(config), "mlp_bias": config.feed_forward_bias}


def _read_smollm3(fields: Fields) -> dict[str, Json]:
    common = read_common(fields, context=32768, base=2e6, tied=True, kv_heads=4)
    layers, every = common["layers"], fields.whole("no_rope_layer_interval", 4)
    turns = [bool(turn) for turn in fields.items("no_rope_layers")] or [
        (i + 1) % every != 0 for i in range(layers)
    ]
    window = fields.whole("sliding_window", None)
    windowed = fields.flag("use_sliding_window", False) and window is not None
    return {
        **common,
        **read_windows(fields, window, layers, [windowed and not turn for turn in turns]),
        "rotary_layers": () if all(turns) else tuple(turns),
        "feed_forward_bias": fields.flag("mlp_bias", False),
    }


def _write_smollm3(config: Config) -> dict[str, object]:
    turns = [int(config.layer_spec(i).rotary) for i in range(config.layers)]
    return {
        **_write_llama(config),
        **write_windows(config),
        "use_sliding_window": config.window is not None,
        "no_rope_layers": turns,
        "no_rope_layer_interval": 4,
    }


def _read_mistral(fields: Fields) -> dict[str, Json]:
    common = read_common(fields, context=4096 * 32, kv_heads=8, bias=False)
    # null is None, absent is 4096
    window = fields.whole("sliding_window", None if fields.says("sliding_window") else 4096)
    everywhere = [window is not None] * common["layers"]
    # with layer_types AutoModel takes Ministral
    return {**common, **read_windows(fields, window, common["layers"], everywhere)}


def _write_mistral(config: Config) -> dict[str, object]:
    return {**write_common(config), "sliding_window": config.window}


def _qwen_windows(fields: Fields, layers: int, whole: int = 28) -> dict[str, Json]:
    window = (
        fields.whole("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    )
    fields.get("sliding_window")
    first = fields.get("max_window_layers", whole)
    return read_windows(
        fields, window, layers, [window is not None and i >= first for i in range(layers)]
    )


def _write_qwen_windows(config: Config) -> dict[str, object]:
    return {
        **write_windows(config),
        "use_sliding_window": config.window is not None,
        "max_window_layers": config.layers,
    }


def _read_qwen2(fields: Fields) -> dict[str, Json]:
    common = read_common(fields, context=32768, kv_heads=32, bias=False)
    return {**common, **_qwen_windows(fields, common["layers"]), "qkv_bias": True}


def _read_qwen3(fields: Fields) -> dict[str, Json]:
    common = read_common(fields, context=32768, kv_heads=32, head_size=128)
    return {**common, **_qwen_windows(fields, common["layers"]), "head_norm": "rms"}


MROPE = {"mrope": "default"}  # of text: all its axes have one position


def _read_qwen2_vl(fields: Fields) -> dict[str, Json]:
    kv_heads = None if fields.says("num_key_value_heads") else 8
    common = read_common(
        fields,
        context=32768,
        base=1e6,
        epsilon=1e-5,
        kv_heads=kv_heads,
        bias=False,
        renamed=MROPE,
    )
    return {**common, **_qwen_windows(fields, common["layers"], 80), "qkv_bias": True}


def _read_qwen3_vl(fields: Fields) -> dict[str, Json]:
    kv_heads = None if fields.says("num_key_value_heads") else 32
    common = read_common(
        fields, context=128000, base=5e5, kv_heads=kv_heads, head_size=128, renamed=MROPE
    )
    for name in ("layer_types", "sliding_window"):
        fields.get(name)  # its class does not read them
    return {**common, "head_norm": "rms"}


def _write_qwen(config: Config) -> dict[str, object]:
    return {**write_common(config), **_write_qwen_windows(config)}


MULTIPLIERS: tuple[tuple[str, str, Callable[[float], float]], ...] = (
    ("attention_scale", "attention_multiplier", lambda x: x),
    ("embedding_scale", "embedding_multiplier", lambda x: x),
    ("residual_scale", "residual_multiplier", lambda x: x),
    ("logit_scale", "logits_scaling", lambda x: 1 / x),  # they divide by it
)


def read_multipliers(fields: Fields) -> dict[str, Json]:
    """The factors of Granite."""
    return {ours: turn(fields.positive(theirs, 1.0)) for ours, theirs, turn in MULTIPLIERS}


def write_multipliers(config: Config) -> dict[str, object]:
    """The same, written."""
    return {
        theirs: turn(config.scale if ours == "attention_scale" else getattr(config, ours))
        for ours, theirs, turn in MULTIPLIERS
    }


def _read_granite(fields: Fields) -> dict[str, Json]:
    return {**_read_llama(fields), **read_multipliers(fields)}


def _write_granite(config: Config) -> dict[str, object]:
    return {**_write_llama(config), **write_multipliers(config)}


def _read_olmo2(fields: Fields) -> dict[str, Json]:
    return {
        **read_common(fields, context=2048, epsilon=1e-5),
        "norm_placement": "after",
        "head_norm": "rms_width",
    }


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, TENSORS)
SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _read_smollm3, _write_smollm3, TENSORS)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, TENSORS)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen, TENSORS)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen, TENSORS)
GRANITE = Family("granite", "GraniteForCausalLM", _read_granite, _write_granite, TENSORS)
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _read_olmo2, write_common, {**TENSORS, **AFTER})
QWEN2_VL, QWEN2_5_VL = (
    Family(name, architecture, _read_qwen2_vl, _write_qwen, TENSORS)
    for name, architecture in (
        ("qwen2_vl_text", "Qwen2VLTextModel"),
        ("qwen2_5_vl_text", "Qwen2_5_VLTextModel"),
    )
)
QWEN3_VL = Family("qwen3_vl_text", "Qwen3VLTextModel", _read_qwen3_vl, _write_qwen, TENSORS)
