"""OLMo 1 and 3; OLMo 2 is beside Llama.

olmo     layer norms without weights
olmo3    norms after; windows, with another rotary base
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
from .layouts import implied, ones
from .llama import AFTER, write_common
from .llama_variants import window_of
from .positions import read_rope, read_two_bases, whole_heads, write_rope, write_two_bases
from .tables import Family, Fields, Json


def _read_olmo(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=2048)
    biased = fields.flag("attention_bias", False)
    return {
        **sizes,
        **whole_heads(read_rope(fields, sizes["context"])),
        "activation": read_activation(fields),
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "tied": fields.flag("tie_word_embeddings", False),
        "qkv_bias": biased,
        "output_bias": biased,
        "qkv_limit": fields.positive("clip_qkv", None),
    }


def _write_olmo(config: Config) -> dict[str, object]:
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "tie_word_embeddings": config.tied,
        "attention_bias": config.output_bias,
        "clip_qkv": config.qkv_limit,
    }


def _read_olmo3(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=2048)
    layers, biased = sizes["layers"], fields.flag("attention_bias", False)
    local = [bool((i + 1) % 4) for i in range(layers)]
    windows = read_windows(fields, window_of(fields, 4096), layers, local)
    bases = fields.get("rope_theta", 5e5), 5e5
    return {
        **sizes,
        **read_two_bases(fields, sizes["context"], bases, windows["window"] is not None),
        **windows,
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-5),
        "tied": fields.flag("tie_word_embeddings", False),
        "qkv_bias": biased,
        "output_bias": biased,
        "norm_placement": "after",
        "head_norm": "rms_width",
    }


def _write_olmo3(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        "rope_scaling": None,
        **write_two_bases(config),
        **write_windows(config),
    }


OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    _read_olmo,
    _write_olmo,
    TENSORS,
    packs=(
        implied(["embedding", "norm"], TENSORS["embedding"], ones),
        implied(
            ["layers.{}.q", "layers.{}.attention_norm", "layers.{}.feed_forward_norm"],
            TENSORS["layers.{}.q"],
            ones,
        ),
    ),
)
OLMO3 = Family("olmo3", "Olmo3ForCausalLM", _read_olmo3, _write_olmo3, {**TENSORS, **AFTER})
