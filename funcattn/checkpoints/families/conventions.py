"""What most families spell alike: sizes, norms, activation, the names of their tensors."""

from ...transformer import Config
from .tables import Fields, Json, refuse

ACTIVATIONS = {  # config.json -> layers.ACTIVATIONS
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
SIZES = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "feed_forward": "intermediate_size",
    "context": "max_position_embeddings",
}

TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "norm_bias": "model.norm.bias",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention_norm_bias": "model.layers.{}.input_layernorm.bias",
    "layers.{}.feed_forward_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward_norm_bias": "model.layers.{}.post_attention_layernorm.bias",
    **{
        f"layers.{{}}.{leaf}{bias}": "model.layers.{}.self_attn."
        f"{leaf}_proj.{'bias' if bias else 'weight'}"
        for leaf in "qkvo"
        for bias in ("", "_bias")
    },
    **{
        f"layers.{{}}.{leaf}{bias}": "model.layers.{}.mlp."
        f"{leaf}_proj.{'bias' if bias else 'weight'}"
        for leaf in ("gate", "up", "down")
        for bias in ("", "_bias")
    },
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.{}.sinks": "model.layers.{}.self_attn.sinks",
}


def read_sizes(
    fields: Fields, *, context: int, kv_heads: int | None = None, head_size: int | None = None
) -> dict[str, Json]:
    """The sizes of a family that calls them as most do.

    Args:
        fields: of config.json.
        context: max_position_embeddings where nothing is said.
        kv_heads: where nothing is said; None is as many as heads.
        head_size: where nothing is said; None is width // heads.
    """
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    return {
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.whole("num_key_value_heads", heads if kv_heads is None else kv_heads),
        "head_size": fields.whole("head_dim", width // heads if head_size is None else head_size),
        "feed_forward": fields.whole("intermediate_size"),
        "context": fields.whole("max_position_embeddings", context),
    }


def write_sizes(config: Config) -> dict[str, object]:
    """The same, written."""
    return {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}


def read_activation(fields: Fields, default: str = "silu", name: str = "hidden_act") -> str:
    """The activation, as ours."""
    return fields.choice(name, ACTIVATIONS, default)


def write_activation(config: Config) -> str | None:
    """The activation, as theirs; None where they have no name for it."""
    return next((theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation), None)


def read_windows(
    fields: Fields, window: int | None, layers: int, default: list[bool]
) -> dict[str, Json]:
    """window and window_layers, from `layer_types` where the file has them.

    Args:
        fields: of config.json.
        window: sliding_window.
        layers: how many there are.
        default: which layers have the window where the file has no layer_types.
    """
    local = [
        _is_local(kind, fields.place("layer_types")) for kind in fields.items("layer_types")
    ] or default
    if len(local) != layers:
        refuse(fields.place("layer_types"), f"one of each of the {layers} layers", f"{len(local)}")
    if not any(local):
        return {"window": None, "window_layers": ()}
    if window is None:
        refuse(fields.place("sliding_window"), "a size, since layer_types names it", None)
    return {"window": window, "window_layers": () if all(local) else tuple(local)}


def _is_local(kind: object, where: str) -> bool:
    if kind not in ("full_attention", "sliding_attention"):
        refuse(where, "full_attention or sliding_attention", kind)
    return kind == "sliding_attention"


def write_windows(config: Config) -> dict[str, object]:
    """sliding_window and layer_types."""
    kinds = [
        "full_attention" if config.layer_spec(i).window is None else "sliding_attention"
        for i in range(config.layers)
    ]
    return {"sliding_window": config.window, "layer_types": kinds}


def turning_where_local(windows: dict[str, Json], layers: int) -> tuple[bool, ...]:
    """rotary_layers of a family whose layers without a window do not turn."""
    if windows["window"] is None:
        return (False,) * layers
    return windows["window_layers"]
