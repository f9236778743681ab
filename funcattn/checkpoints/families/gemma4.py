"""Gemma 3n and 4: per-layer embeddings, keys and values that later layers read again.

gemma3n_text    alternating updates of four streams, a low-rank residual, sparse feed-forwards
gemma4_text     heads of another size in layers without a window, where keys may be the values; a
                feed-forward twice as wide in layers without keys of their own, or experts beside it
gemma4_unified_text     the same without experts and per-layer embeddings
"""

from dataclasses import replace

from ...transformer import Config
from .conventions import TENSORS, read_windows, write_windows
from .gemma import AROUND, read_cap, read_gemma_sizes, write_gemma_sizes
from .layouts import halves, of_experts, stacked
from .llama_variants import LAYER
from .positions import read_two_bases, write_two_bases
from .tables import Family, Fields, Json, refuse

INPUTS = {
    "layer_embedding": "model.embed_tokens_per_layer.weight",
    "layer_projection": "model.per_layer_model_projection.weight",
    "layer_projection_norm": "model.per_layer_projection_norm.weight",
    "layers.{}.input_gate": LAYER + "per_layer_input_gate.weight",
    "layers.{}.input_out": LAYER + "per_layer_projection.weight",
    "layers.{}.input_norm": LAYER + "post_per_layer_input_norm.weight",
}
STREAMS = {
    "stream_router": "altup.modality_router.weight",
    "stream_norm": "altup.router_norm.weight",
    "stream_predict": "altup.prediction_coefs.weight",
    "stream_correct": "altup.correction_coefs.weight",
    "stream_scale": "altup.correct_output_scale",
    "laurel_down": "laurel.linear_left.weight",
    "laurel_up": "laurel.linear_right.weight",
    "laurel_norm": "laurel.post_laurel_norm.weight",
}
MIXTURE = {  # the dense feed-forward is the shared expert, and norms of experts have numbers
    "router": "router.proj.weight",
    "router_scale": "router.scale",
    "expert_scale": "router.per_expert_scale",
    "expert_after_norm": "post_feedforward_layernorm_2.weight",
    "shared_norm": "pre_feedforward_layernorm.weight",
    "shared_after_norm": "post_feedforward_layernorm_1.weight",
    **{f"shared_{leaf}": f"mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")},
}
KEYS = ("k_proj", "v_proj", "k_norm", "v_norm")


def unused(config: Config) -> frozenset[str]:
    """Keys and values of layers which read those of others, as published files have them, and
    scales of streams that are not scaled.
    """
    own, each = config.layers - config.shared_layers, range(config.layers)
    keys = (f"self_attn.{name}.{kind}" for name in KEYS for kind in ("weight", "bias"))
    found = {f"model.layers.{i}.{name}" for name in keys for i in each[own:]}
    scales = {f"model.layers.{i}.altup.correct_output_scale" for i in each}
    return frozenset(found if config.stream_scale else found | scales)


def read_count(fields: Fields, name: str, default: int) -> int:
    """A size that may be 0."""
    given = fields.get(name, default)
    return 0 if given == 0 and not isinstance(given, bool) else fields.whole(name, default)


def _read_common(
    fields: Fields, context: int, kv_heads: int, every: int, window: int
) -> dict[str, Json]:
    """Sizes, windows (the last of `every` layers has none) and angles."""
    sizes = read_gemma_sizes(fields, context, kv_heads, "hidden_activation")
    near = [bool((i + 1) % every) for i in range(sizes["layers"])]
    windows = read_windows(fields, fields.whole("sliding_window", window), sizes["layers"], near)
    bases = fields.get("rope_theta", 1e6), fields.get("rope_local_base_freq", 1e4)
    has_window = windows["window"] is not None
    return {
        **sizes,
        **windows,
        **read_two_bases(fields, sizes["context"], bases, has_window, proportional=True),
        "norm_offset": 0.0,
        "norm_placement": "around",
        "attention_scale": 1.0,
        "head_norm": "rms",
        "value_norm": True,
    }


def _read_inputs(fields: Fields, P: int, vocabulary: int) -> dict[str, Json]:
    """Per-layer embeddings; P where the file does not say how many features."""
    size = read_count(fields, "hidden_size_per_layer_input", P)
    rows = read_count(fields, "vocab_size_per_layer_input", vocabulary)
    return {"layer_embedding_size": size, "layer_vocabulary": rows if size else 0}


def _write_common(config: Config) -> dict[str, object]:
    return {
        **write_gemma_sizes(config, "hidden_activation"),
        **write_windows(config),
        **write_two_bases(config),
        "final_logit_softcapping": config.logit_cap,
        "num_kv_shared_layers": config.shared_layers,
        "hidden_size_per_layer_input": config.layer_embedding_size,
        "vocab_size_per_layer_input": config.layer_vocabulary,
    }


def _read_gemma3n(fields: Fields) -> dict[str, Json]:
    given = fields.get("intermediate_size")
    each = given if isinstance(given, list) and given else [given]
    fields.values = {**fields.values, "intermediate_size": each[0]}
    common = _read_common(fields, 32768, 2, 5, 512)
    layers = common["layers"]
    sizes: list[Json] = each * layers if len(each) == 1 else each
    if len(sizes) != layers or not all(type(size) is int and size > 0 for size in sizes):
        refuse(fields.place("intermediate_size"), f"sizes of {layers} layers", given)
    pattern = fields.items("activation_sparsity_pattern")
    pattern = pattern or [0.95 * (i < 10 < layers) for i in range(layers)]
    if len(pattern) != layers or not all(type(x) in (int, float) and 0 <= x < 1 for x in pattern):
        refuse(fields.place("activation_sparsity_pattern"), f"{layers} shares below 1", pattern)
    streams, active = fields.whole("altup_num_inputs", 4), read_count(fields, "altup_active_idx", 0)
    fields.get("altup_coef_clip")  # of training
    return {
        **common,
        **_read_inputs(fields, 256, 262144),
        "logit_cap": read_cap(fields, "final_logit_softcapping", 30.0),
        "shared_layers": read_count(fields, "num_kv_shared_layers", 15),
        "feed_forward_sizes": () if len({*sizes}) == 1 else tuple(sizes),
        "sparsities": tuple(map(float, pattern)) if any(pattern) else (),
        "streams": streams,
        "active_stream": active,
        "stream_scale": fields.flag("altup_correct_scale", True),
        "laurel_size": fields.whole("laurel_rank", 64),
    }


def _write_gemma3n(config: Config) -> dict[str, object]:
    sizes = config.feed_forward_sizes or (config.feed_forward,) * config.layers
    return {
        **_write_common(config),
        "intermediate_size": list(sizes),
        "activation_sparsity_pattern": list(config.sparsities or (0.0,) * config.layers),
        "altup_num_inputs": config.streams,
        "altup_active_idx": config.active_stream,
        "altup_correct_scale": config.stream_scale,
        "laurel_rank": config.laurel_size,
    }


def _read_heads(fields: Fields, common: dict[str, Json]) -> dict[str, Json]:
    """Heads of layers without a window, in either format; those of the file are of the others."""
    layers, tied = common["layers"], fields.flag("attention_k_eq_v", False)
    near = common["window_layers"] or (common["window"] is not None,) * layers
    sizes = {"head_dim": fields.whole("global_head_dim", 512)}
    sizes["num_key_value_heads"] = fields.whole("num_global_key_value_heads", None)
    if not tied or sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = common["kv_heads"]
    given = fields.get("per_layer_config")
    if given is not None:
        usual = {"head_dim": common["head_size"], "num_key_value_heads": common["kv_heads"]}
        wanted = [i for i in range(layers) if not near[i]]
        each = list(given.values()) if isinstance(given, dict) else [None]
        one = each[0] if each else {}
        if (
            not isinstance(one, dict)
            or any(other != one for other in each)
            or not one.keys() <= usual.keys()
            or (one and sorted(int(i) if f"{i}".isdigit() else -1 for i in given) != wanted)
        ):
            told = f"{' and '.join(usual)} of each layer without a window, the same in all"
            refuse(fields.place("per_layer_config"), told, given)
        sizes = {**usual, **one}
    far = fields.place("per_layer_config")
    found = {
        "head_size": Fields(sizes, far + ": {}").whole("head_dim"),
        "kv_heads": Fields(sizes, far + ": {}").whole("num_key_value_heads"),
        "key_values": tied,
    }
    others = {"local_head_size": "head_size", "local_kv_heads": "kv_heads"}
    return found | {
        ours: common[name]
        for ours, name in others.items()
        if any(near) and common[name] != found[name]
    }


def _read_gemma4(fields: Fields, *, unified: bool = False) -> dict[str, Json]:
    turning = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    usual = {"rope_parameters": {"full_attention": turning}}
    fields.values = {**usual, **fields.values}
    context, window = (262144, 1024) if unified else (131072, 512)
    common = _read_common(fields, context, 4, 6, window)
    layers, F = common["layers"], common["feed_forward"]
    if common["window"] is not None and (common["window_layers"] or (True,))[-1]:
        refuse(fields.place("layer_types"), "full_attention in the last layer", "a window")
    shared = read_count(fields, "num_kv_shared_layers", 0)
    wide = fields.flag("use_double_wide_mlp", False) and shared > 0
    mixture = not unified and fields.flag("enable_moe_block", False)
    experts: dict[str, Json] = {}
    if mixture:
        experts = {
            "experts": fields.whole("num_experts"),
            "experts_per_token": fields.whole("top_k_experts"),
            "expert_size": fields.whole("moe_intermediate_size"),
            "shared_size": F,
            "experts_apart": True,
        }
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        fields.get(name)  # of files without experts too
    inputs = {} if unified else _read_inputs(fields, 256, 262144)
    if inputs.get("layer_embedding_size") and inputs["layer_vocabulary"] < common["vocabulary"]:
        wanted = f"at least vocab_size = {common['vocabulary']}"
        refuse(fields.place("vocab_size_per_layer_input"), wanted, inputs["layer_vocabulary"])
    return {
        **common,
        **_read_heads(fields, common),
        **inputs,
        **experts,
        "logit_cap": read_cap(fields, "final_logit_softcapping", None),
        "shared_layers": shared,
        "feed_forward_sizes": (F,) * (layers - shared) + (2 * F,) * shared if wide else (),
        "layer_scale": True,
    }


def _write_gemma4(config: Config) -> dict[str, object]:
    if config.shared_layers and not config.layer_embedding_size:
        wanted = "one with per-layer embeddings, since its class fails without them"
        refuse("num_kv_shared_layers", wanted, config.shared_layers)
    return _write_heads(config)


def _write_heads(config: Config) -> dict[str, object]:
    written = _write_common(config)
    far = {"head_dim": config.head_size, "num_key_value_heads": config.kv_heads}
    near = config.window is not None
    sizes = (config.local_head_size or config.head_size, config.local_kv_heads or config.kv_heads)
    kinds = [config.layer_spec(i).window is None for i in range(config.layers)]
    return {
        **written,
        **(dict(zip(far, sizes, strict=True)) if near else far),
        "global_head_dim": config.head_size,  # older readers
        "num_global_key_value_heads": config.kv_heads,
        "per_layer_config": {str(i): far for i, full in enumerate(kinds) if full},
        "sliding_window": config.window or config.context,
        "attention_k_eq_v": config.key_values,
        "use_double_wide_mlp": bool(config.feed_forward_sizes),
        "enable_moe_block": bool(config.experts),
        "num_experts": config.experts or None,
        "top_k_experts": config.experts_per_token or None,
        "moe_intermediate_size": config.expert_size or None,
    }


UNIFIED = ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block")
UNIFIED += ("num_experts", "top_k_experts", "moe_intermediate_size")


def _write_unified(config: Config) -> dict[str, object]:
    return {name: x for name, x in _write_heads(config).items() if name not in UNIFIED}


COMMON = {**TENSORS, **AROUND}
GEMMA3N = Family(
    "gemma3n_text",
    "Gemma3nForCausalLM",
    _read_gemma3n,
    _write_gemma3n,
    {**COMMON, **INPUTS, **{f"layers.{{}}.{leaf}": LAYER + x for leaf, x in STREAMS.items()}},
    packs=tuple(
        stacked(f"streams_{side}", f"model.altup_{name}.{{expert}}.weight", experts=False)
        for side, name in (("in", "projections"), ("out", "unembed_projections"))
    ),
    body="Gemma3nTextModel",
    unused=unused,
)
GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    _read_gemma4,
    _write_gemma4,
    {
        **COMMON,
        **INPUTS,
        **{f"layers.{{}}.{leaf}": LAYER + name for leaf, name in MIXTURE.items()},
        "layers.{}.layer_scale": LAYER + "layer_scalar",
    },
    packs=(
        halves(LAYER + "experts.gate_up_proj"),
        of_experts("layers.{}.down", LAYER + "experts.down_proj"),
        of_experts("layers.{}.feed_forward_norm", LAYER + "pre_feedforward_layernorm_2.weight"),
    ),
    neutral={"use_bidirectional_attention": ("vision",)},  # of images alone
    body="Gemma4TextModel",
    unused=unused,
)
GEMMA4_UNIFIED = replace(
    GEMMA4,
    name="gemma4_unified_text",
    architecture="Gemma4UnifiedForCausalLM",
    read=lambda fields: _read_gemma4(fields, unified=True),
    write=_write_unified,
    packs=(),
    body="Gemma4UnifiedTextModel",
)
