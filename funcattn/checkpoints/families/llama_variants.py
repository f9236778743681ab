"""Families that are a Llama with other defaults, other names, or other kinds of layers.

exaone internlm3 iquestcoder       a Llama
cwm ministral                      windows by layer
seed_oss                           biases of q, k and v; another of o
helium ernie4_5 glm glm4           angles on neighbouring features, of a part of each head in the
                                   last two
exaone4                            norms after; layers without a window do not turn

What a family computes that one before it in the catalogue can say is written as that one.
"""

from ...transformer import Config
from .conventions import (
    TENSORS,
    read_activation,
    read_sizes,
    read_windows,
    turning_where_local,
    write_windows,
)
from .layouts import fused, rotated
from .llama import AFTER, LLAMA, read_common, write_common
from .positions import partial_heads, read_rope, write_rope
from .tables import Family, Fields, Json, Pack, refuse

LAYER = "model.layers.{}."
NEIGHBOURS = tuple(
    rotated(f"layers.{{}}.{leaf}{ours}", f"{LAYER}self_attn.{leaf}_proj.{theirs}")
    for leaf in "qk"
    for ours, theirs in (("", "weight"), ("_bias", "bias"))
)


def gate_and_up(name: str) -> Pack:
    """Gate and up of a dense feed-forward in one tensor."""
    paths = [f"layers.{{}}.{leaf}" for leaf in ("gate", "up")]
    return fused(paths, name, lambda config: [config.feed_forward] * 2)


def read_variant(
    fields: Fields,
    *,
    context: int,
    base: float = 10000.0,
    epsilon: float = 1e-6,
    tied: bool = False,
    kv_heads: int | None = None,
    head_size: int | None = None,
    bias: bool = True,
    feed_forward_bias: bool = False,
) -> dict[str, Json]:
    """`read_common` of classes that take null for what follows from the other sizes.

    `feed_forward_bias`: whether mlp_bias is a field of the family.
    """
    if fields.says("num_key_value_heads"):
        kv_heads = None
    if fields.says("head_dim"):
        head_size = None
    return {
        **read_common(
            fields,
            context=context,
            base=base,
            epsilon=epsilon,
            tied=tied,
            kv_heads=kv_heads,
            head_size=head_size,
            bias=bias,
        ),
        "feed_forward_bias": feed_forward_bias and fields.flag("mlp_bias", False),
    }


def window_of(fields: Fields, default: int) -> int | None:
    """sliding_window, where null is none."""
    return fields.whole("sliding_window", None if fields.says("sliding_window") else default)


def _read_exaone(fields: Fields) -> dict[str, Json]:
    return read_variant(
        fields, context=4096, base=5e5, epsilon=1e-5, kv_heads=8, feed_forward_bias=True
    )


def _read_internlm3(fields: Fields) -> dict[str, Json]:
    return read_variant(
        fields, context=32768, epsilon=1e-5, kv_heads=2, head_size=128, feed_forward_bias=True
    )


def _read_iquestcoder(fields: Fields) -> dict[str, Json]:
    return read_variant(
        fields, context=131072, epsilon=1e-5, kv_heads=8, head_size=128, feed_forward_bias=True
    )


CWM_ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def _read_cwm(fields: Fields) -> dict[str, Json]:
    if fields.get("rope_parameters") is None and fields.get("rope_scaling") is None:
        fields.values["rope_parameters"] = {"rope_theta": 1e6, **CWM_ROPE}
    common = read_variant(
        fields,
        context=131072,
        base=1e6,
        epsilon=1e-5,
        kv_heads=8,
        head_size=128,
        bias=False,
        feed_forward_bias=True,
    )
    layers = common["layers"]
    windows = read_windows(
        fields, window_of(fields, 8192), layers, [bool(i % 4) for i in range(layers)]
    )
    return {**common, **windows}


def _read_ministral(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=4096 * 32, kv_heads=8, bias=False)
    window = window_of(fields, 4096)
    everywhere = [window is not None] * common["layers"]
    return {**common, **read_windows(fields, window, common["layers"], everywhere)}


def _read_seed_oss(fields: Fields) -> dict[str, Json]:
    return {
        **read_variant(
            fields,
            context=524288,
            kv_heads=8,
            head_size=128,
            bias=False,
            feed_forward_bias=True,
        ),
        "qkv_bias": fields.flag("attention_bias", True),
        "output_bias": fields.flag("attention_out_bias", False),
    }


def _write_seed_oss(config: Config) -> dict[str, object]:
    biases = {"attention_bias": config.qkv_bias, "attention_out_bias": config.output_bias}
    return {**LLAMA.write(config), **biases}


def _read_helium(fields: Fields) -> dict[str, Json]:
    common = read_variant(
        fields,
        context=4096,
        base=1e5,
        epsilon=1e-8,
        kv_heads=20,
        head_size=128,
        feed_forward_bias=True,
    )
    return {**common, "output_bias": False}  # its class has none of o


def _read_ernie(fields: Fields) -> dict[str, Json]:
    biased = fields.flag("use_bias", False)
    common = read_variant(
        fields,
        context=131072,
        base=5e5,
        epsilon=1e-5,
        tied=True,
        kv_heads=2,
        head_size=128,
        bias=False,
    )
    return {**common, "qkv_bias": biased, "output_bias": biased, "feed_forward_bias": biased}


def _read_glm(fields: Fields) -> dict[str, Json]:
    heads = None if fields.says("head_dim") else 128
    sizes = read_sizes(
        fields,
        context=131072,
        kv_heads=None if fields.says("num_key_value_heads") else 2,
        head_size=heads,
    )
    return {
        **sizes,
        **partial_heads(read_rope(fields, sizes["context"], share=0.5), sizes["head_size"]),
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1.5625e-7),
        "tied": fields.flag("tie_word_embeddings", False),
        "qkv_bias": fields.flag("attention_bias", True),
    }


def _read_glm4(fields: Fields) -> dict[str, Json]:
    return {**_read_glm(fields), "norm_placement": "around"}


def _write_glm(config: Config) -> dict[str, object]:
    rope = write_rope(config)
    share = rope["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return {
        **write_common(config),
        **rope,
        "partial_rotary_factor": share,
        "attention_bias": config.qkv_bias,
    }


def _read_exaone4(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=2048, epsilon=1e-5, kv_heads=32, bias=False)
    layers, window = common["layers"], window_of(fields, 4096)
    every = fields.get("sliding_window_pattern", 4)
    if not isinstance(every, int) or every < 1:
        every = None
    if every is None and window is not None and not fields.items("layer_types"):
        refuse(fields.place("sliding_window_pattern"), "an integer, without layer_types", every)
    local = [window is not None and (i + 1) % (every or 1) != 0 for i in range(layers)]
    windows = read_windows(fields, window, layers, local)
    return {
        **common,
        **windows,
        "rotary_layers": turning_where_local(windows, layers) if window is not None else (),
        "norm_placement": "after",
        "head_norm": "rms",
    }


def _write_exaone4(config: Config) -> dict[str, object]:
    windows = write_windows(config)
    if config.window is None and config.rotary_layers:  # a window that no layer has
        windows["sliding_window"] = config.context
    return {**write_common(config), **windows, "sliding_window_pattern": 4}


EXAONE = Family(
    "exaone",
    "LlamaForCausalLM",
    _read_exaone,
    LLAMA.write,
    {
        "embedding": "transformer.wte.weight",
        "norm": "transformer.ln_f.weight",
        "head": "lm_head.weight",
        "layers.{}.attention_norm": "transformer.h.{}.ln_1.weight",
        "layers.{}.feed_forward_norm": "transformer.h.{}.ln_2.weight",
        **{
            f"layers.{{}}.{ours}{bias}": f"transformer.h.{{}}.{theirs}.{kind}"
            for ours, theirs in (
                *((leaf, f"attn.attention.{leaf}_proj") for leaf in "qkv"),
                ("o", "attn.attention.out_proj"),
                ("gate", "mlp.c_fc_0"),
                ("up", "mlp.c_fc_1"),
                ("down", "mlp.c_proj"),
            )
            for kind, bias in (("weight", ""), ("bias", "_bias"))
        },
    },
    prefix="transformer.",
    also=("ExaoneForCausalLM",),
)
INTERNLM3 = Family(
    "internlm3",
    "LlamaForCausalLM",
    _read_internlm3,
    LLAMA.write,
    TENSORS,
    also=("InternLM3ForCausalLM",),
)
IQUESTCODER = Family(
    "iquestcoder",
    "LlamaForCausalLM",
    _read_iquestcoder,
    LLAMA.write,
    TENSORS,
    also=("IQuestCoderForCausalLM",),
)
CWM = Family("cwm", "CwmForCausalLM", _read_cwm, LLAMA.write, TENSORS)
MINISTRAL = Family("ministral", "MinistralForCausalLM", _read_ministral, LLAMA.write, TENSORS)
SEED_OSS = Family("seed_oss", "SeedOssForCausalLM", _read_seed_oss, _write_seed_oss, TENSORS)
HELIUM = Family("helium", "HeliumForCausalLM", _read_helium, LLAMA.write, TENSORS, packs=NEIGHBOURS)
ERNIE4_5 = Family(
    "ernie4_5", "Ernie4_5ForCausalLM", _read_ernie, LLAMA.write, TENSORS, packs=NEIGHBOURS
)
GLM = Family(
    "glm",
    "GlmForCausalLM",
    _read_glm,
    _write_glm,
    TENSORS,
    packs=(*NEIGHBOURS, gate_and_up(LAYER + "mlp.gate_up_proj.weight")),
)
GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    _read_glm4,
    _write_glm,
    {
        **TENSORS,
        "layers.{}.attention_after_norm": LAYER + "post_self_attn_layernorm.weight",
        "layers.{}.feed_forward_after_norm": LAYER + "post_mlp_layernorm.weight",
    },
    packs=GLM.packs,
)
EXAONE4 = Family(
    "exaone4", "Exaone4ForCausalLM", _read_exaone4, _write_exaone4, {**TENSORS, **AFTER}
)
