"""Dense families with one idea more than those of Llama, GPT-NeoX and Granite.

phi gptj codegen      a bias of the head; angles on neighbouring features in the last two
nemotron jais2        layer norms, a squared relu; norm weights around 0 in the first
arcee                 a squared relu
hunyuan_v1_dense      queries and keys normalized after rotation
hunyuan_v1_moe        the same, of experts and one that every token takes
ministral3            queries grow with the logarithm of their positions
"""

import re

import torch
from torch import Tensor

from ...transformer import Config
from .conventions import TENSORS, read_activation, read_sizes, write_activation, write_sizes
from .gpt import ALIASES, LAYER_NORM, of_layers
from .layouts import half_split, interleave, rotated
from .llama import LLAMA, write_common
from .llama_variants import LAYER, read_variant
from .mixture_variants import EXPERTS, aliased, shared_names
from .positions import partial_heads, read_rope, write_rope
from .tables import Family, Fields, Json, Pack, refuse

BLOCK = "transformer.h.{}."


def _read_phi(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=2048)
    if fields.flag("qk_layernorm", False):
        refuse(fields.place("qk_layernorm"), False, True)
    return {
        **LAYER_NORM,
        **sizes,
        **partial_heads(read_rope(fields, sizes["context"], share=0.5), sizes["head_size"]),
        "activation": read_activation(fields, "gelu_new"),
        "norm_epsilon": fields.positive("layer_norm_eps", 1e-5),
        "parallel": True,
        "shared_norm": True,
        "qkv_bias": True,
        "output_bias": True,
        "head_bias": True,
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _write_partial(config: Config) -> dict[str, object]:
    rope = write_rope(config)
    share = rope["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return {
        **write_sizes(config),
        **rope,
        "partial_rotary_factor": share,
        "hidden_act": write_activation(config),
        "tie_word_embeddings": config.tied,
    }


def _write_phi(config: Config) -> dict[str, object]:
    return {**_write_partial(config), "layer_norm_eps": config.norm_epsilon}


def _read_gptj(fields: Fields) -> dict[str, Json]:
    for alias, name in ALIASES.items():
        if fields.get(alias) not in (None, fields.get(name)):
            refuse(fields.place(alias), f"absent, or what {name} is", fields.get(alias))
    width, heads = fields.whole("n_embd"), fields.whole("n_head")
    size = width // heads
    turning = fields.whole("rotary_dim", None if fields.says("rotary_dim") else 64)
    if turning is None:  # its angles are then those of the whole width
        refuse(fields.place("rotary_dim"), "a size", None)
    return {
        **LAYER_NORM,
        "vocabulary": fields.whole("vocab_size"),
        "width": width,
        "layers": fields.whole("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": size,
        "rotary_size": None if turning == size else turning,
        "feed_forward": fields.whole("n_inner", 4 * width),
        "context": fields.whole("n_positions", 2048),
        "activation": read_activation(fields, "gelu_new", "activation_function"),
        "norm_epsilon": fields.positive("layer_norm_epsilon", 1e-5),
        "parallel": True,
        "shared_norm": True,
        "head_bias": True,
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _write_gptj(config: Config) -> dict[str, object]:
    return {
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward,
        "n_positions": config.context,
        "rotary_dim": config.rotary_size or config.head_size,
        "activation_function": write_activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


SHARDS = 4  # of the machines that CodeGen was trained on, in its matrix of q, v and k


def _unpack_codegen(config: Config, tensors: list[Tensor]) -> list[Tensor]:
    q, v, k = tensors[0].unflatten(0, (SHARDS, 3, -1)).transpose(0, 1).flatten(1, 2)
    size, turning = config.head_size, config.rotary_size
    return [half_split(q, size, turning), half_split(k, size, turning), v.contiguous()]


def _pack_codegen(config: Config, leaves: list[Tensor]) -> list[Tensor]:
    q, k, v = leaves
    size, turning = config.head_size, config.rotary_size
    parts = interleave(q, size, turning), v, interleave(k, size, turning)
    return [torch.stack([part.unflatten(0, (SHARDS, -1)) for part in parts], 1).flatten(0, 2)]


def _read_nemotron(fields: Fields) -> dict[str, Json]:
    sizes = read_sizes(fields, context=4096)
    biased = fields.flag("attention_bias", False)
    return {
        **LAYER_NORM,
        **sizes,
        **partial_heads(read_rope(fields, sizes["context"], share=0.5), sizes["head_size"]),
        "activation": read_activation(fields, "relu2"),
        "norm_epsilon": fields.positive("norm_eps", 1e-5),
        "norm_offset": 1.0,
        "qkv_bias": biased,
        "output_bias": biased,
        "feed_forward_bias": fields.flag("mlp_bias", False),
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _write_nemotron(config: Config) -> dict[str, object]:
    return {
        **_write_partial(config),
        "norm_eps": config.norm_epsilon,
        "attention_bias": config.output_bias,
        "mlp_bias": config.feed_forward_bias,
    }


def _read_jais2(fields: Fields) -> dict[str, Json]:
    fields.values = {"hidden_act": "relu2", "attention_bias": True, **fields.values}
    common = read_variant(fields, context=8192)
    return {
        **LAYER_NORM,
        **common,
        "norm_epsilon": fields.positive("layer_norm_eps", 1e-5),
        "feed_forward_bias": fields.flag("mlp_bias", True),
    }


def _write_jais2(config: Config) -> dict[str, object]:
    return {**LLAMA.write(config), "layer_norm_eps": config.norm_epsilon}


def _read_arcee(fields: Fields) -> dict[str, Json]:
    fields.values = {"hidden_act": "relu2", **fields.values}
    common = read_variant(fields, context=4096, epsilon=1e-5, feed_forward_bias=True)
    return {**common, "gated": False}


def _read_hunyuan(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=2048, epsilon=1e-5)
    return {**common, "head_norm": "rms", "late_head_norm": True}


def _read_hunyuan_moe(fields: Fields) -> dict[str, Json]:
    common = _read_hunyuan(fields)
    return {
        **common,
        "experts": aliased(fields, "num_experts", "num_local_experts", 1),
        "experts_per_token": aliased(fields, "moe_topk", "num_experts_per_tok", 1),
        "expert_size": common["feed_forward"],
        "shared_size": common["feed_forward"],
    }


def _write_hunyuan_moe(config: Config) -> dict[str, object]:
    experts = {"num_experts": config.experts, "moe_topk": config.experts_per_token}
    return {**write_common(config), **experts}


MINISTRAL = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
BETA, ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"


def _read_ministral3(fields: Fields) -> dict[str, Json]:
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or MINISTRAL
    place = fields.place("rope_parameters")
    if not isinstance(rope, dict):
        refuse(place, "an object", rope)
    beta, size = rope.get(BETA), fields.get(ORIGINAL, rope.get(ORIGINAL))  # as `read_rope` does
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0 <= beta < 1e30:
        refuse(f"{BETA} of {place}", "a number", beta)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        refuse(f"{ORIGINAL} of {place}", "a size", size)
    plain = {name: x for name, x in rope.items() if name not in (BETA, "max_position_embeddings")}
    fields.values = {**fields.values, "rope_parameters": plain, "rope_scaling": {}}
    common = read_variant(
        fields, context=262144, epsilon=1e-5, kv_heads=8, head_size=128, bias=False
    )
    return {
        **common,
        "window": fields.whole("sliding_window", None),
        "attention_temperature": (float(beta), size),
    }


def _write_ministral3(config: Config) -> dict[str, object]:
    found = {**write_common(config), "sliding_window": config.window, "rope_scaling": None}
    beta, size = config.attention_temperature or (0.0, config.context)
    rope = {**write_rope(config, nested=True), BETA: beta, ORIGINAL: size}
    return {**found, "rope_parameters": rope}


PHI = Family(
    "phi",
    "PhiForCausalLM",
    _read_phi,
    _write_phi,
    {
        **TENSORS,
        "norm": "model.final_layernorm.weight",
        "norm_bias": "model.final_layernorm.bias",
        "head_bias": "lm_head.bias",
        **of_layers((("o", "self_attn.dense"), ("up", "mlp.fc1"), ("down", "mlp.fc2")), LAYER),
    },
)
GPTJ_NAMES = {
    "embedding": "transformer.wte.weight",
    "norm": "transformer.ln_f.weight",
    "norm_bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
    "layers.{}.v": BLOCK + "attn.v_proj.weight",
    "layers.{}.o": BLOCK + "attn.out_proj.weight",
    **of_layers((("attention_norm", "ln_1"), ("up", "mlp.fc_in"), ("down", "mlp.fc_out")), BLOCK),
}
BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|causal_mask|embed_positions)"
)
GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    _read_gptj,
    _write_gptj,
    GPTJ_NAMES,
    packs=tuple(rotated(f"layers.{{}}.{x}", f"{BLOCK}attn.{x}_proj.weight") for x in "qk"),
    harmless=BUFFERS,
    prefix="transformer.",
)
CODEGEN = Family(
    "codegen",
    "CodeGenForCausalLM",
    _read_gptj,
    _write_gptj,
    GPTJ_NAMES,
    packs=(
        Pack(
            ("layers.{}.q", "layers.{}.k", "layers.{}.v"),
            (BLOCK + "attn.qkv_proj.weight",),
            _unpack_codegen,
            _pack_codegen,
        ),
    ),
    harmless=BUFFERS,
    prefix="transformer.",
)
NEMOTRON = Family("nemotron", "NemotronForCausalLM", _read_nemotron, _write_nemotron, TENSORS)
JAIS2 = Family("jais2", "Jais2ForCausalLM", _read_jais2, _write_jais2, TENSORS)
ARCEE = Family("arcee", "ArceeForCausalLM", _read_arcee, LLAMA.write, TENSORS)
HUNYUAN_NAMES = {
    **TENSORS,
    "layers.{}.q_norm": LAYER + "self_attn.query_layernorm.weight",
    "layers.{}.k_norm": LAYER + "self_attn.key_layernorm.weight",
}
HUNYUAN_DENSE = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    _read_hunyuan,
    write_common,
    HUNYUAN_NAMES,
)
HUNYUAN_MOE = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    _read_hunyuan_moe,
    _write_hunyuan_moe,
    {
        **HUNYUAN_NAMES,
        **shared_names("mlp.shared_mlp"),
        "layers.{}.router": LAYER + "mlp.gate.wg.weight",
    },
    packs=EXPERTS,
)
MINISTRAL3 = Family(
    "ministral3", "Ministral3ForCausalLM", _read_ministral3, _write_ministral3, TENSORS
)
