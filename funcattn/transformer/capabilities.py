"""Which configs a fast path computes, field by field of Config: an allow-list.

A fast path names every field of Config that it supports, with the values that it computes; a config
with another field or another value runs on the general path. So a new field of Config is never
ignored by accident: a fast path computes it only once its table names it.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TypeAlias

from .. import layers
from .config import Config

ANY = ("any value",)  # of a field that the path supports in full, or that is computed outside it
Table: TypeAlias = Mapping[str, Collection[object]]


# Fields that the general path alone computes, at the values where they change nothing.
GENERAL: Table = {
    "head_bias": (False,),
    "late_head_norm": (False,),
    "qkv_limit": (None,),
    "attention_temperature": (None,),
    "router_scores": ("softmax",),
    "router_margin": (0.0,),
    "choice_bias": (False,),
    "expert_groups": (1,),
    "groups_per_token": (1,),
    "group_best": (2,),
    "routing_scale": (1.0,),
    "shared_size": (0,),
    "shared_gated": (False,),
    "mixers": ((),),
    **dict.fromkeys(("convolution_size", "convolution_bias"), ANY),  # of recurrent layers alone
    **dict.fromkeys(("state_heads", "state_key_heads"), ANY),
    **dict.fromkeys(("state_key_size", "state_value_size", "negative_eigenvalues"), ANY),
    **dict.fromkeys(("mixer_norm_epsilon", "mixer_norm_placement", "mixer_norm"), ANY),
    **dict.fromkeys(("mixer_bias", "mixer_output_bias", "step_limit"), ANY),
    **dict.fromkeys(("mixer_rank", "feature_decay", "mixer_gate_activation"), ANY),
    **dict.fromkeys(("mixer_factors", "attention_factors", "feed_forward_factors"), ((),)),
    "feed_forward_layers": ((),),
    "value_size": (None,),
    "latent_size": (0,),
    "query_latent_size": (0,),
    "late_temperature": (False,),
    "attention_gate": ("none",),
    "gate_activation": ("sigmoid",),
    "chunked": (False,),
    "local_rotary_size": (None,),
    "routed_inputs": (False,),
    "embedding_norm": (False,),
    "first_norm": (True,),
    "head_transform": (False,),
    "embedding_size": (0,),
    "local_head_size": (None,),
    "local_kv_heads": (None,),
    "local_sinks": (False,),
    "shared_layers": (0,),
    "value_norm": (False,),
    "key_values": (False,),
    "feed_forward_sizes": ((),),
    "sparsities": ((),),
    "experts_apart": (False,),
    "layer_embedding_size": (0,),
    "layer_vocabulary": ANY,  # of a layer_embedding_size alone
    "layer_scale": (False,),
    "streams": (0,),
    **dict.fromkeys(("active_stream", "stream_scale"), ANY),  # of streams alone
    "laurel_size": (0,),
}
PLACEMENTS = ("before", "after", "around")
NORMS_OF_HEADS = ("none", "rms", "rms_width", "layer")
PLACES = ("rotary", "learned", "none")  # values of `positions`
LATENT = ("value_size", "latent_size", "query_latent_size")
# The fields supported by paths that run layer.py itself: compiled decoding, which reads the cache,
# prepares the weights and caches code for a config.
FIELDS: Table = {
    **dict.fromkeys(("vocabulary", "width", "layers", "heads", "kv_heads", "head_size"), ANY),
    **dict.fromkeys(("feed_forward", "norm_epsilon", "context", "tied"), ANY),
    "activation": tuple(layers.ACTIVATIONS),
    "head_norm": NORMS_OF_HEADS,
    "positions": PLACES,
    **dict.fromkeys(("qkv_bias", "output_bias", "attention_scale"), ANY),
    **dict.fromkeys(("attention_cap", "sinks", "window", "window_layers"), ANY),
    **dict.fromkeys(("rope_base", "rope_scaling", "rotary_size"), ANY),
    **dict.fromkeys(("rotary_layers", "local_rope_base"), ANY),
    **dict.fromkeys(("norm", "norm_bias", "norm_offset"), ANY),
    "norm_placement": PLACEMENTS,
    **dict.fromkeys(("parallel", "shared_norm", "residual_scale"), ANY),
    **dict.fromkeys(("gated", "feed_forward_bias", "activation_limit"), ANY),
    **dict.fromkeys(("experts", "experts_per_token", "expert_size", "expert_layers"), ANY),
    **dict.fromkeys(("normalized_routing", "router_bias"), ANY),
    **dict.fromkeys(("embedding_scale", "logit_scale", "logit_cap"), ANY),
    **GENERAL,
    **dict.fromkeys(LATENT, ANY),
}
# Those of smoothing, which moves factors between the weights of a layer.
SMOOTHED: Table = {**FIELDS, **{name: GENERAL[name] for name in LATENT}}
OF_LAYERS: Table = {
    **dict.fromkeys(("window", "rotary", "local", "experts"), ANY),
    "mixer": ("attention",),
    "feeds": (True,),
    "keys_of": (None,),
    "sparsity": (0.0,),
}


def why_not(config: Config, table: Table = FIELDS, of_layers: Table = OF_LAYERS) -> str:
    """Why a path with this allow-list does not compute a config, or "" where it does.

    Args:
        config: the config to compute.
        table: field of Config -> the values that the path computes, or ANY. The default is that of
            any path that runs layer.py itself.
        of_layers: the same for the fields of LayerSpec, of every layer.

    Example:
        >>> why_not(Config(norm="layer"), {**FIELDS, "norm": ("rms",)})
        "it knows norm = 'rms' only, and this is 'layer'"
    """
    for field in dataclasses.fields(config):
        if why := _unknown("", field.name, getattr(config, field.name), table):
            return why
    for number in range(config.layers):
        spec = config.layer_spec(number)
        for name, value in zip(spec._fields, spec, strict=True):
            if why := _unknown(f"layers.{number}.", name, value, of_layers):
                return why
    return ""


def _unknown(prefix: str, name: str, value: object, table: Table) -> str:
    values = table.get(name)
    if values is None:
        return f"it knows no {prefix}{name}, and this is {value!r}"
    if values is ANY or value in values:
        return ""
    return f"it knows {prefix}{name} = {' or '.join(map(repr, values))} only, and this is {value!r}"
