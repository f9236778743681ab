"""Mixtures of experts: Mixtral, Qwen3-MoE and GPT-OSS (sinks, yarn, alternating windows, clamped
SwiGLU).
"""

import torch
from torch import Tensor

from ...transformer import Config
from .conventions import TENSORS, read_windows, write_windows
from .layouts import halves, of_experts, stacked, transposed
from .llama import MROPE, read_common, write_common
from .tables import Family, Fields, Json, Pack, refuse

LAYER = "model.layers.{}."


def _read_mixtral(fields: Fields) -> dict[str, Json]:
    common = read_common(fields, context=4096 * 32, base=1e6, epsilon=1e-5, kv_heads=8, bias=False)
    return {
        **common,
        "window": fields.whole("sliding_window", None),
        "experts": fields.whole("num_local_experts", 8),
        "experts_per_token": fields.whole("num_experts_per_tok", 2),
        "expert_size": common["feed_forward"],
    }


def _write_mixtral(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        "sliding_window": config.window,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def _read_qwen3_moe(fields: Fields) -> dict[str, Json]:
    common = read_common(fields, context=32768, kv_heads=4)
    layers = common["layers"]
    window = fields.whole("sliding_window", None if fields.says("sliding_window") else 4096)
    every, dense = fields.whole("decoder_sparse_step", 1), fields.items("mlp_only_layers")
    chosen = [i not in dense and (i + 1) % every == 0 for i in range(layers)]
    experts = fields.whole("num_experts", fields.whole("num_local_experts", 128))
    fields.get("num_local_experts")
    return {
        **common,
        "window": window if fields.flag("use_sliding_window", False) else None,
        "head_norm": "rms",
        "experts": experts if any(chosen) else 0,
        "experts_per_token": fields.whole("num_experts_per_tok", 8),
        "expert_size": fields.whole("moe_intermediate_size", 768),
        "expert_layers": () if all(chosen) else tuple(chosen),
        "normalized_routing": fields.flag("norm_topk_prob", False),
    }


def _write_qwen3_moe(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        "sliding_window": config.window,
        "use_sliding_window": config.window is not None,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.layers) if not config.layer_spec(i).experts],
        "norm_topk_prob": config.normalized_routing,
    }


def _read_qwen3_vl_moe(fields: Fields) -> dict[str, Json]:
    kv_heads = None if fields.says("num_key_value_heads") else 16
    common = read_common(
        fields, context=128000, base=5e5, kv_heads=kv_heads, tied=True, renamed=MROPE
    )
    every, dense = fields.whole("decoder_sparse_step", 1), fields.items("mlp_only_layers")
    chosen = [i not in dense and (i + 1) % every == 0 for i in range(common["layers"])]
    experts = fields.whole("num_experts", fields.whole("num_local_experts", 60))
    for name in ("num_local_experts", "sliding_window"):
        fields.get(name)  # its class does not read the latter
    return {
        **common,
        "head_norm": "rms",
        "experts": experts if any(chosen) else 0,
        "experts_per_token": fields.whole("num_experts_per_tok", 4),
        "expert_size": fields.whole("moe_intermediate_size", 1408),
        "expert_layers": () if all(chosen) else tuple(chosen),
    }


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def _read_gpt_oss(fields: Fields) -> dict[str, Json]:
    if fields.get("rope_parameters") is None and fields.get("rope_scaling") is None:
        fields.values["rope_scaling"] = {**YARN, "original_max_position_embeddings": 4096}
    biased = fields.flag("attention_bias", True)
    common = read_common(
        fields, context=131072, base=150000.0, epsilon=1e-5, kv_heads=8, head_size=64
    )
    window, layers = (
        fields.whole("sliding_window", None if fields.says("sliding_window") else 128),
        common["layers"],
    )
    for name, wanted in (("swiglu_alpha", 1.702), ("hidden_act", "silu")):
        if fields.get(name, wanted) != wanted:
            refuse(fields.place(name), wanted, fields.get(name))
    return {
        **common,
        **read_windows(fields, window, layers, [bool((i + 1) % 2) for i in range(layers)]),
        "activation": "quick_gelu",
        "activation_limit": fields.positive("swiglu_limit", 7.0),
        "qkv_bias": biased,
        "output_bias": biased,
        "feed_forward_bias": True,
        "sinks": True,
        "experts": fields.whole("num_local_experts", 128),
        "experts_per_token": fields.whole("num_experts_per_tok", 4),
        "expert_size": common["feed_forward"],
        "router_bias": True,
    }


def _write_gpt_oss(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        **write_windows(config),
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        "swiglu_limit": config.activation_limit,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def _unpack_pairs(config: Config, tensors: list[Tensor]) -> list[Tensor]:
    """Gate and up on neighbouring columns, (X, E, 2 F) or (X, 2 F)."""
    turn = lambda x: x.mT if x.dim() > 2 else x
    return [turn(tensors[0][..., i::2]).contiguous() for i in range(2)]


def _pack_pairs(config: Config, leaves: list[Tensor]) -> list[Tensor]:
    turn = lambda x: x.mT if x.dim() > 2 else x
    return [torch.stack([turn(leaf) for leaf in leaves], -1).flatten(-2)]


def _pairs(bias: str) -> Pack:
    paths = tuple(f"layers.{{}}.{leaf}{bias}" for leaf in ("gate", "up"))
    return Pack(paths, (f"{LAYER}mlp.experts.gate_up_proj{bias}",), _unpack_pairs, _pack_pairs)


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    {**TENSORS, "layers.{}.router": LAYER + "block_sparse_moe.gate.weight"},
    packs=tuple(
        stacked(
            f"layers.{{}}.{ours}", LAYER + f"block_sparse_moe.experts.{{expert}}.{theirs}.weight"
        )
        for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    ),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3_moe,
    _write_qwen3_moe,
    {**TENSORS, "layers.{}.router": LAYER + "mlp.gate.weight"},
    packs=tuple(
        stacked(f"layers.{{}}.{leaf}", LAYER + f"mlp.experts.{{expert}}.{leaf}_proj.weight")
        for leaf in ("gate", "up", "down")
    ),
)
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _read_gpt_oss,
    _write_gpt_oss,
    {
        **TENSORS,
        "layers.{}.router": LAYER + "mlp.router.weight",
        "layers.{}.router_bias": LAYER + "mlp.router.bias",
        "layers.{}.down_bias": LAYER + "mlp.experts.down_proj_bias",
    },
    packs=(
        _pairs(""),
        _pairs("_bias"),
        transposed("layers.{}.down", LAYER + "mlp.experts.down_proj"),
    ),
)
QWEN3_VL_MOE = Family(
    "qwen3_vl_moe_text",
    "Qwen3VLMoeTextModel",
    _read_qwen3_vl_moe,
    _write_qwen3_moe,
    QWEN3_MOE.tensors,
    packs=(
        halves(LAYER + "mlp.experts.gate_up_proj", turned=True),
        of_experts("layers.{}.down", LAYER + "mlp.experts.down_proj", turned=True),
    ),
)
