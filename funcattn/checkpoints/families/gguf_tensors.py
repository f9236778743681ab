"""The names of tensors in GGUF files, and those that hold other than one leaf as it is.

Source: github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py and convert_hf_to_gguf.py.
"""

from .layouts import fused
from .tables import Pack

BLOCK = "blk.{}."
STORED = {  # leaves of a layer, each a weight and perhaps a bias
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
    "shared_gate": "ffn_gate_shexp",
    "shared_up": "ffn_up_shexp",
    "shared_down": "ffn_down_shexp",
}
TENSORS = {
    "embedding": "token_embd.weight",
    "positions": "position_embd.weight",
    "norm": "output_norm.weight",
    "norm_bias": "output_norm.bias",
    "head": "output.weight",
    **{f"layers.{{}}.{leaf}": f"{BLOCK}{name}.weight" for leaf, name in STORED.items()},
    **{f"layers.{{}}.{leaf}_bias": f"{BLOCK}{name}.bias" for leaf, name in STORED.items()},
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.{}.sinks": "blk.{}.attn_sinks.weight",
    "layers.{}.attention_after_norm": "blk.{}.post_attention_norm.weight",
    "layers.{}.feed_forward_after_norm": "blk.{}.post_ffw_norm.weight",
}
# the norm between attention and feed-forward, by the name of the norm after attention
BETWEEN = {**TENSORS, "layers.{}.feed_forward_norm": "blk.{}.post_attention_norm.weight"}


def _experts(leaf: str, kind: str) -> Pack:
    """Weights or biases of all experts in one tensor, as here."""
    bias = "_bias" if kind == "bias" else ""
    same = lambda config, tensors: tensors
    applies = lambda config, layer: config.layer_spec(layer).experts
    return Pack(
        (f"layers.{{}}.{leaf}{bias}",), (f"blk.{{}}.ffn_{leaf}_exps.{kind}",), same, same, applies
    )


EXPERTS = tuple(
    _experts(leaf, kind) for leaf in ("gate", "up", "down") for kind in ("weight", "bias")
)
# the row that gates the shared expert, which converters squeeze
SHARED_ROUTER = Pack(
    ("layers.{}.shared_router",),
    ("blk.{}.ffn_gate_inp_shexp.weight",),
    lambda config, tensors: [tensors[0].reshape(1, -1)],
    lambda config, leaves: [leaves[0].reshape(-1)],
)


def qkv(*kinds: str) -> tuple[Pack, ...]:
    """q, k and v one under the other in one tensor."""
    sizes = lambda config: [
        n * config.head_size for n in (config.heads, config.kv_heads, config.kv_heads)
    ]
    suffix = {"weight": "", "bias": "_bias"}
    return tuple(
        fused(
            [f"layers.{{}}.{leaf}{suffix[kind]}" for leaf in "qkv"],
            f"blk.{{}}.attn_qkv.{kind}",
            sizes,
        )
        for kind in kinds
    )


# gate over up
GATE_UP = fused(
    ["layers.{}.gate", "layers.{}.up"],
    "blk.{}.ffn_up.weight",
    lambda config: [config.feed_forward] * 2,
)
