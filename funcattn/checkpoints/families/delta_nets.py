"""Families with gated delta nets in the place of attention in most layers.

qwen3_next                       projections of all parts in one tensor, by key head; experts
qwen3_5_text qwen3_5_moe_text    a tensor for each; dense, or experts
olmo_hybrid                      norms after attention, before a net; often without positions
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ...transformer import Config
from .conventions import TENSORS, read_activation, read_sizes
from .layouts import squeezed
from .llama import AFTER, read_common, write_common
from .llama_variants import LAYER
from .mixture_variants import EXPERTS, ROUTER, layers_with, shared_names, write_experts
from .positions import partial_heads, read_rope
from .tables import Family, Fields, Json, Pack, refuse

NET = LAYER + "linear_attn."
HEADS = {  # Config -> config.json
    "state_heads": "linear_num_value_heads",
    "state_key_heads": "linear_num_key_heads",
    "state_key_size": "linear_key_head_dim",
    "state_value_size": "linear_value_head_dim",
    "convolution_size": "linear_conv_kernel_dim",
}
KINDS = {"full_attention": "attention", "linear_attention": "gated_delta"}
MULTIPLE = re.compile(r"mtp\..*|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
QWEN = {
    **TENSORS,
    **ROUTER,
    **shared_names("mlp.shared_expert"),
    "layers.{}.shared_router": LAYER + "mlp.shared_expert_gate.weight",
    "layers.{}.mixer_in": NET + "in_proj_qkv.weight",
    "layers.{}.mixer_gate": NET + "in_proj_z.weight",
    "layers.{}.mixer_beta": NET + "in_proj_b.weight",
    "layers.{}.mixer_rate": NET + "in_proj_a.weight",
    "layers.{}.mixer_out": NET + "out_proj.weight",
    "layers.{}.log_rate": NET + "A_log",
    "layers.{}.rate_bias": NET + "dt_bias",
    "layers.{}.mixer_norm": NET + "norm.weight",
}
CONVOLUTION = squeezed("layers.{}.convolution", NET + "conv1d.weight")


def _gated_queries() -> Pack:
    """The queries of each head, and below them their gates."""

    def unpack(config: Config, x: list[Tensor]) -> list[Tensor]:
        heads = x[0].unflatten(0, (config.heads, 2, config.head_size)).unbind(1)
        return [part.flatten(0, 1).contiguous() for part in heads]

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        heads = [leaf.unflatten(0, (config.heads, config.head_size)) for leaf in leaves]
        return [torch.stack(heads, 1).flatten(0, 2)]

    paths = "layers.{}.q", "layers.{}.attention_gate"
    return Pack(paths, (LAYER + "self_attn.q_proj.weight",), unpack, pack)


def _of_key_heads() -> Pack:
    """By key head: its query, its key, its values and their gates, one under the other; in another
    tensor the betas and rates.
    """
    names = NET + "in_proj_qkvz.weight", NET + "in_proj_ba.weight"
    paths = tuple(f"layers.{{}}.mixer_{leaf}" for leaf in ("in", "gate", "beta", "rate"))

    def sizes(config: Config) -> tuple[int, int, int, int]:
        group = config.state_heads // config.state_key_heads
        rows = group * config.state_value_size
        return config.state_key_heads, config.state_key_size, rows, group

    def unpack(config: Config, x: list[Tensor]) -> list[Tensor]:
        K, D, rows, group = sizes(config)
        q, k, v, gate = x[0].unflatten(0, (K, -1)).split([D, D, rows, rows], 1)
        beta, rate = x[1].unflatten(0, (K, -1)).split([group, group], 1)
        mixed = torch.cat([part.flatten(0, 1) for part in (q, k, v)])
        return [mixed, *(part.flatten(0, 1).contiguous() for part in (gate, beta, rate))]

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        K, D, rows, _ = sizes(config)
        parts = *leaves[0].split([K * D, K * D, K * rows]), *leaves[1:]
        q, k, v, gate, beta, rate = (part.unflatten(0, (K, -1)) for part in parts)
        return [torch.cat(some, 1).flatten(0, 1) for some in ((q, k, v, gate), (beta, rate))]

    return Pack(paths, names, unpack, pack)


def _read_mixers(fields: Fields, layers: int, default: list[str]) -> tuple[str, ...]:
    kinds = fields.items("layer_types") or default
    if len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        wanted = f"{' or '.join(KINDS)} for each of the {layers} layers"
        refuse(fields.place("layer_types"), wanted, kinds)
    return tuple(KINDS[kind] for kind in kinds)


def _write_mixers(config: Config) -> dict[str, object]:
    theirs = {ours: name for name, ours in KINDS.items()}
    return {
        **{name: getattr(config, ours) for ours, name in HEADS.items()},
        "layer_types": [theirs.get(kind, kind) for kind in config.mixers],
    }


def _every(n: int, layers: int) -> list[str]:
    """Every n-th layer has attention."""
    return ["linear_attention" if (i + 1) % n else "full_attention" for i in range(layers)]


def _read_qwen(fields: Fields, kv_heads: int) -> dict[str, Json]:
    sizes = read_sizes(fields, context=32768, kv_heads=kv_heads, head_size=256)
    layers, every = sizes["layers"], fields.whole("full_attention_interval", 4)
    if fields.flag("attention_bias", False):
        refuse(fields.place("attention_bias"), False, True)
    numbers = (32, 16, 128, 128, 4)
    return {
        **sizes,
        **partial_heads(read_rope(fields, sizes["context"], share=0.25), sizes["head_size"]),
        "activation": read_activation(fields),
        "norm_epsilon": fields.positive("rms_norm_eps", 1e-6),
        "norm_offset": 1.0,
        "tied": fields.flag("tie_word_embeddings", False),
        "head_norm": "rms",
        "attention_gate": "width",
        "mixers": _read_mixers(fields, layers, _every(every, layers)),
        **{
            ours: fields.whole(name, usual)
            for (ours, name), usual in zip(HEADS.items(), numbers, strict=True)
        },
    }


def _write_qwen(config: Config) -> dict[str, object]:
    share = 1.0 if config.rotary_size is None else config.rotary_size / config.head_size
    common = write_common(config)
    rope = common["rope_parameters"]
    assert isinstance(rope, dict)
    whole = {"partial_rotary_factor": share}  # said in full too: a fourth is the default
    return {**common, **_write_mixers(config), **whole, "rope_parameters": {**rope, **whole}}


def _read_shared(fields: Fields, chosen: list[bool], experts: int, each: int) -> dict[str, Json]:
    return {
        **layers_with(chosen, experts),
        "experts_per_token": fields.whole("num_experts_per_tok", each),
        "expert_size": fields.whole("moe_intermediate_size", 512),
        "shared_size": fields.whole("shared_expert_intermediate_size", 512),
        "shared_gated": True,
    }


def _read_qwen3_next(fields: Fields) -> dict[str, Json]:
    common = _read_qwen(fields, kv_heads=2)
    every, dense = fields.whole("decoder_sparse_step", 1), fields.items("mlp_only_layers")
    chosen = [i not in dense and (i + 1) % every == 0 for i in range(common["layers"])]
    experts = fields.whole("num_experts", 512)
    return {
        **common,
        **_read_shared(fields, chosen, experts, 10),
        "normalized_routing": fields.flag("norm_topk_prob", True),
    }


def _write_shared(config: Config) -> dict[str, object]:
    return {
        **_write_qwen(config),
        **write_experts(config),
        "moe_intermediate_size": config.expert_size,
        "shared_expert_intermediate_size": config.shared_size,
    }


def _write_qwen3_next(config: Config) -> dict[str, object]:
    dense = [i for i in range(config.layers) if not config.layer_spec(i).experts]
    return {**_write_shared(config), "decoder_sparse_step": 1, "mlp_only_layers": dense}


def _read_qwen3_5(fields: Fields) -> dict[str, Json]:
    return _read_qwen(fields, kv_heads=4)


def _read_qwen3_5_moe(fields: Fields) -> dict[str, Json]:
    fields.values.setdefault("intermediate_size", fields.get("moe_intermediate_size", 512))
    fields.get("norm_topk_prob")  # its router always normalizes
    common = _read_qwen(fields, kv_heads=2)
    experts = fields.whole("num_experts", 256)
    return {**common, **_read_shared(fields, [True] * common["layers"], experts, 8)}


def _read_olmo_hybrid(fields: Fields) -> dict[str, Json]:
    rope = fields.get("rope_parameters", {})
    inner = isinstance(rope, dict) and "rope_theta" in rope
    base = rope["rope_theta"] if inner else fields.get("rope_theta", 10000.0)
    turning = base is not None and not (
        not inner and fields.says("rope_theta") and fields.get("rope_theta") is None
    )
    common = read_common(fields, context=65536)
    layers, heads = common["layers"], common["heads"]
    usual = _every(4, layers)
    usual[-1] = usual[-1] if "full_attention" in usual else "full_attention"
    Hk = fields.whole("linear_num_key_heads", heads)
    Dk = fields.whole("linear_key_head_dim", int(0.75 * common["width"] / Hk))
    for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"):
        fields.get(f"linear_{name}")  # of the first weights
    return {
        **common,
        "positions": "rotary" if turning else "none",
        "norm_placement": "after",
        "head_norm": "rms_width",
        "mixers": _read_mixers(fields, layers, usual),
        "mixer_norm_placement": "before",
        "mixer_norm_epsilon": 1e-5,  # whatever that of the others is
        "negative_eigenvalues": fields.flag("linear_allow_neg_eigval", True),
        "state_heads": fields.whole("linear_num_value_heads", heads),
        "state_key_heads": Hk,
        "state_key_size": Dk,
        "state_value_size": fields.whole("linear_value_head_dim", 2 * Dk),
        "convolution_size": fields.whole("linear_conv_kernel_dim", 4),
    }


def _write_olmo_hybrid(config: Config) -> dict[str, object]:
    common = {**write_common(config), **_write_mixers(config)}
    if config.positions == "none":
        common |= {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
        common |= {"rope_theta": None}
    return {**common, "linear_allow_neg_eigval": config.negative_eigenvalues}


def _parts(config: Config) -> list[int]:
    keys = config.state_key_heads * config.state_key_size
    return [keys, keys, config.state_heads * config.state_value_size]


def _three(path: str, name: str) -> Pack:
    """A leaf of the queries, keys and values of a net, in three tensors with an axis of one more
    for convolutions; transformers 5 cuts these in thirds instead.
    """
    axis = "conv1d" in name

    def pack(config: Config, x: list[Tensor]) -> list[Tensor]:
        parts = x[0].split(_parts(config))
        return [part.unsqueeze(1) if axis else part for part in parts]

    def thirds(config: Config, x: list[Tensor]) -> list[Tensor]:
        return [part.unsqueeze(1) for part in x[0].chunk(3)]

    unpack = lambda _, x: [torch.cat([part.squeeze(1) if axis else part for part in x])]
    names = tuple(NET + name.format(part) for part in "qkv")
    three = Pack((path,), names, unpack, pack)
    return replace(three, other=replace(three, pack=thirds)) if axis else three


OF_OLMO = {
    "layers.{}.mixer_gate": NET + "g_proj.weight",
    "layers.{}.mixer_beta": NET + "b_proj.weight",
    "layers.{}.mixer_rate": NET + "a_proj.weight",
    "layers.{}.mixer_out": NET + "o_proj.weight",
    "layers.{}.log_rate": NET + "A_log",
    "layers.{}.rate_bias": NET + "dt_bias",
    "layers.{}.mixer_norm": NET + "o_norm.weight",
}
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    _read_qwen3_next,
    _write_qwen3_next,
    QWEN,
    packs=(_gated_queries(), _of_key_heads(), CONVOLUTION, *EXPERTS),
    harmless=MULTIPLE,
)
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _read_qwen3_5,
    _write_qwen,
    QWEN,
    packs=(_gated_queries(), CONVOLUTION),
    harmless=MULTIPLE,
    body="Qwen3_5TextModel",
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    _read_qwen3_5_moe,
    _write_shared,
    QWEN,
    packs=(_gated_queries(), CONVOLUTION, *EXPERTS),
    harmless=MULTIPLE,
    body="Qwen3_5MoeTextModel",
)
OLMO_HYBRID = Family(
    "olmo_hybrid",
    "OlmoHybridForCausalLM",
    _read_olmo_hybrid,
    _write_olmo_hybrid,
    {**TENSORS, **AFTER, **OF_OLMO},
    packs=(
        _three("layers.{}.mixer_in", "{}_proj.weight"),
        _three("layers.{}.convolution", "{}_conv1d.weight"),
    ),
    older={"attention_layer_norm": "input_layernorm"}
    | {"feedforward_layer_norm": "post_attention_layernorm"},
)
