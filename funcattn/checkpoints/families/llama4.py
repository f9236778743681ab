"""Llama 4: attention within chunks of the text, and far layers that do not turn.

Heads have length one after rotation, queries of the far layers grow with the logarithm of their
positions, and each expert reads its input times a sigmoid.
"""

from ...transformer import Config
from .conventions import TENSORS
from .layouts import halves, of_experts, turned
from .llama import write_common
from .llama_variants import LAYER, NEIGHBOURS, read_variant
from .mixture_variants import layers_with, shared_names
from .tables import Family, Fields, Json, refuse

KINDS = ("full_attention", "chunked_attention")


def _read_llama4(fields: Fields) -> dict[str, Json]:
    fields.values = {"intermediate_size": 8192, **fields.values}
    kv_heads = None if fields.says("num_key_value_heads") else 8
    common = read_variant(
        fields, context=131072, base=5e5, epsilon=1e-5, kv_heads=kv_heads, head_size=128
    )
    layers, every = common["layers"], fields.whole("no_rope_layer_interval", 4)
    turns = [bool(x) for x in fields.items("no_rope_layers")]
    turns = turns or [(i + 1) % every != 0 for i in range(layers)]
    if len(turns) != layers:
        refuse(fields.place("no_rope_layers"), f"one for each of the {layers} layers", len(turns))
    default = None if fields.says("attention_chunk_size") else 8192
    size = fields.whole("attention_chunk_size", default)
    kinds = fields.items("layer_types") or [KINDS[turn and size is not None] for turn in turns]
    if len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        refuse(fields.place("layer_types"), f"{' or '.join(KINDS)} for each layer", kinds)
    near = tuple(kind == KINDS[1] for kind in kinds)
    if any(near) and size is None:
        refuse(fields.place("attention_chunk_size"), "a size, since layer_types names it", None)
    step = fields.whole("interleave_moe_layer_step", 1)
    listed = fields.items("moe_layers") if fields.get("moe_layers") is not None else None
    chosen = [(i + 1) % step == 0 if listed is None else i in listed for i in range(layers)]
    tuned = fields.flag("attn_temperature_tuning", True)
    warmth = fields.positive("attn_scale", 0.1), fields.whole("floor_scale", 8192)
    unit = fields.flag("use_qk_norm", True)
    return {
        **common,
        "feed_forward": fields.whole("intermediate_size_mlp", 16384),
        "rotary_layers": () if all(turns) else tuple(turns),
        "window": size if any(near) else None,
        "window_layers": () if all(near) or not any(near) else near,
        "chunked": any(near),
        "head_norm": "unit" if unit else "none",
        "late_head_norm": unit,
        "attention_temperature": warmth if tuned else None,
        "late_temperature": tuned,
        **layers_with(chosen, fields.whole("num_local_experts", 16)),
        "experts_per_token": fields.whole("num_experts_per_tok", 1),
        "expert_size": common["feed_forward"],
        "normalized_routing": False,
        "router_scores": "sigmoid",
        "routed_inputs": True,
        "shared_size": common["feed_forward"],
    }


def _write_llama4(config: Config) -> dict[str, object]:
    specs = [config.layer_spec(i) for i in range(config.layers)]
    warmth, size = config.attention_temperature or (0.1, 8192)
    return {
        **write_common(config),
        "intermediate_size": config.expert_size,
        "intermediate_size_mlp": config.feed_forward,
        "no_rope_layers": [int(spec.rotary) for spec in specs],
        "layer_types": [KINDS[spec.window is not None] for spec in specs],
        "attention_chunk_size": config.window,
        "use_qk_norm": config.late_head_norm,
        "attn_temperature_tuning": config.attention_temperature is not None,
        "attn_scale": warmth,
        "floor_scale": size,
        "moe_layers": [i for i, spec in enumerate(specs) if spec.experts],
        "num_local_experts": config.experts or 1,
        "num_experts_per_tok": config.experts_per_token,
    }


DENSE = LAYER + "feed_forward."
LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    _read_llama4,
    _write_llama4,
    {
        **TENSORS,
        **{f"layers.{{}}.{x}": f"{DENSE}{x}_proj.weight" for x in ("gate", "up", "down")},
        **shared_names("feed_forward.shared_expert"),
        "layers.{}.router": DENSE + "router.weight",
    },
    packs=(
        *NEIGHBOURS,
        turned(halves(DENSE + "experts.gate_up_proj", turned=True)),
        turned(of_experts("layers.{}.down", DENSE + "experts.down_proj", turned=True)),
    ),
    neutral={"router_jitter_noise": (0.0, 0)},
    body="Llama4TextModel",
)
