"""Latent attention in GGUF files: the architecture deepseek2 (DeepSeek-V2 and V3, Kimi-K2,
GLM-4.7-Flash), and every architecture by name.

Older files have keys and values of each head in one matrix, as Hugging Face has them. Newer ones
have two, of which that of the keys is transposed, and name the sizes of the absorbed attention
beside those of a head.

Source: github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and src/models/deepseek2.cpp.
"""

import math
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from ...transformer import Config
from .architectures import GGUF, Gguf
from .gemma_gguf import GEMMAS
from .gguf_tensors import EXPERTS, TENSORS
from .latent_layouts import keys_and_values, neighbours
from .tables import Fields, Json, Pack, refuse

SPLIT = "blk.0.attn_k_b.weight"  # a tensor of newer files
NAMES = {
    **TENSORS,
    "layers.{}.q_down": "blk.{}.attn_q_a.weight",
    "layers.{}.q_down_norm": "blk.{}.attn_q_a_norm.weight",
    "layers.{}.kv_down_norm": "blk.{}.attn_kv_a_norm.weight",
    "layers.{}.choice_bias": "blk.{}.exp_probs_b.bias",
    **{
        f"layers.{{}}.shared_{leaf}": f"blk.{{}}.ffn_{leaf}_shexp.weight"
        for leaf in ("gate", "up", "down")
    },
}


def prepare(fields: Fields) -> dict[str, Json]:
    """What these files say of a head in other words than other architectures."""
    heads = fields.whole("attention.head_count")
    if fields.get("attention.head_count_kv", heads) not in (1, heads):
        wanted = f"1 or {heads}, the number of heads"
        got = fields.get("attention.head_count_kv")
        refuse(fields.place("attention.head_count_kv"), wanted, got)
    rank, turning = fields.whole("attention.kv_lora_rank"), fields.whole("rope.dimension_count")
    absorbed = {"key": rank + turning, "value": rank}
    sizes = {}
    for side, size in absorbed.items():
        name = f"attention.{side}_length"
        if f"{name}_mla" in fields.values:
            if fields.whole(name, size) != size:
                refuse(fields.place(name), f"{size}, as the other sizes say", fields.get(name))
            sizes[side] = fields.whole(f"{name}_mla")
        else:
            sizes[side] = fields.whole(name)
    replaced = {"attention.key_length": sizes["key"], "attention.head_count_kv": heads}
    fields.values = {**fields.values, **replaced, "attention.value_length": sizes["key"]}
    return {
        "latent_size": rank,
        "query_latent_size": fields.whole("attention.q_lora_rank", None) or 0,
        "value_size": sizes["value"],
    }


def _read(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    layers, found = sizes["layers"], {}
    dense = fields.get("leading_dense_block_count", 0)
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        refuse(fields.place("leading_dense_block_count"), "a number of layers", dense)
    chosen = [i >= dense for i in range(layers)]
    sigmoid = fields.get("expert_gating_func", 1) == 2
    if fields.get("expert_gating_func", 1) not in (0, 1, 2):
        place = fields.place("expert_gating_func")
        refuse(place, "1 (softmax) or 2 (sigmoid)", fields.get("expert_gating_func"))
    if any(chosen):
        size = fields.whole("expert_feed_forward_length")
        groups, kept = fields.get("expert_group_count", 1), fields.get("expert_group_used_count", 1)
        found = {
            "experts": fields.whole("expert_count"),
            "experts_per_token": fields.whole("expert_used_count"),
            "expert_size": size,
            "expert_layers": () if all(chosen) else tuple(chosen),
            "normalized_routing": fields.flag("expert_weights_norm", False),
            "router_scores": "sigmoid" if sigmoid else "softmax",
            "choice_bias": any(name.endswith("exp_probs_b.bias") for name in tensors),
            "expert_groups": groups or 1,
            "groups_per_token": kept or 1,
            "group_best": 2 if sigmoid or (groups or 1) == 1 else 1,
            "routing_scale": fields.get("expert_weights_scale", 0.0) or 1.0,
            "shared_size": size * (fields.get("expert_shared_count", 0) or 0),
        }
    over, scaling = fields.get("rope.scaling.yarn_log_multiplier", 0.0), sizes["rope_scaling"]
    if over and scaling is not None and scaling.kind == "yarn":
        # A tenth of `mscale_all_dim`. In the published models `mscale` is as great: the factor is
        # that of the logits alone, and cosines have none.
        stretch = over * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        found["attention_scale"] = sizes["head_size"] ** -0.5 * stretch * stretch
        sizes["rope_scaling"] = replace(scaling, attention=1.0)
    return found


def _transposed(config: Config, tensors: list[Tensor]) -> list[Tensor]:
    """Keys (H, R, n) to (H n, R)."""
    return [tensors[0].mT.flatten(0, 1).contiguous()]


def _by_head(config: Config, leaves: list[Tensor]) -> list[Tensor]:
    return [leaves[0].unflatten(0, (config.heads, -1)).mT.contiguous()]


ANGLES = (
    neighbours("layers.{}.q", "blk.{}.attn_q_b.weight", low=True),
    neighbours("layers.{}.q", "blk.{}.attn_q.weight"),
    neighbours("layers.{}.kv_down", "blk.{}.attn_kv_a_mqa.weight"),
)
TWO = (
    Pack(("layers.{}.k",), ("blk.{}.attn_k_b.weight",), _transposed, _by_head),
    Pack(
        ("layers.{}.v",),
        ("blk.{}.attn_v_b.weight",),
        lambda _, x: [x[0].flatten(0, 1)],
        lambda config, x: [x[0].unflatten(0, (config.heads, -1))],
    ),
)
_of_file = lambda packs, other: Gguf(
    _read, NAMES, (*packs, *ANGLES, *EXPERTS), partial=True, prepare=prepare, other=other
)
ARCHITECTURES = {
    **GGUF,
    **GEMMAS,
    "deepseek2": _of_file(
        (keys_and_values("blk.{}.attn_kv_b.weight"),), (SPLIT, _of_file(TWO, None))
    ),
}
