"""Gemma 3n and 4 in GGUF files, whose tensors are those of Hugging Face's files by other names.

Nothing is added to norm weights, no rows are turned, and layers that read the keys of others may
have tensors of keys nevertheless. The projections into and out of the other streams of 3n are
stacked; its shares of zero features are quantiles of the normal distribution; its low-rank residual
has 64 features, and its streams are scaled, in every file. Tables of embeddings are padded with
rows of zeros (of images and sounds) to the same length, and those zeros are what is read for them.
A table of factors says which planes turn in layers of 4 without a window, and a tensor of values
that is absent says that the keys' is used.

A soft cap that the file does not say is 30 in 3n, where llama.cpp reads no field of it and always
has 30, and none in 4, whose converter leaves it out where the original has none.

Source: github.com/ggml-org/llama.cpp, conversion/gemma.py, src/models/gemma3n.cpp and gemma4.cpp,
src/llama-hparams.h.
"""

import math
from collections.abc import Collection

import numpy as np

from ...transformer import Config
from .architectures import Gguf, read_pattern
from .gemma4 import read_count
from .gguf_tensors import TENSORS
from .layouts import halves, of_experts
from .tables import Fields, Json, refuse, whole

INPUTS = {
    "layer_embedding": "per_layer_token_embd.weight",
    "layer_projection": "per_layer_model_proj.weight",
    "layer_projection_norm": "per_layer_proj_norm.weight",
    "layers.{}.input_gate": "blk.{}.inp_gate.weight",
    "layers.{}.input_out": "blk.{}.proj.weight",
    "layers.{}.input_norm": "blk.{}.post_norm.weight",
}
STREAMS = {
    "streams_in": "altup_proj.weight",
    "streams_out": "altup_unembd_proj.weight",
    "layers.{}.stream_router": "blk.{}.altup_router.weight",
    "layers.{}.stream_norm": "blk.{}.altup_router_norm.weight",
    "layers.{}.stream_predict": "blk.{}.altup_predict_coef.weight",
    "layers.{}.stream_correct": "blk.{}.altup_correct_coef.weight",
    "layers.{}.stream_scale": "blk.{}.altup_correct_scale.weight",
    "layers.{}.laurel_down": "blk.{}.laurel_l.weight",
    "layers.{}.laurel_up": "blk.{}.laurel_r.weight",
    "layers.{}.laurel_norm": "blk.{}.laurel_post_norm.weight",
}
MIXTURE = {  # the dense feed-forward is the shared expert
    "layers.{}.layer_scale": "blk.{}.layer_output_scale.weight",
    "layers.{}.router_scale": "blk.{}.ffn_gate_inp.scale",
    "layers.{}.expert_scale": "blk.{}.ffn_down_exps.scale",
    "layers.{}.expert_after_norm": "blk.{}.post_ffw_norm_2.weight",
    "layers.{}.shared_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.shared_after_norm": "blk.{}.post_ffw_norm_1.weight",
    **{f"layers.{{}}.shared_{x}": f"blk.{{}}.ffn_{x}.weight" for x in ("gate", "up", "down")},
}
OF_LAYERS = ("attention.sliding_window_pattern", "feed_forward_length")


def _unused(config: Config) -> frozenset[str]:
    """Keys and values of layers that read those of others."""
    shared = range(config.layers - config.shared_layers, config.layers)
    return frozenset(f"blk.{i}.attn_{x}.weight" for i in shared for x in ("k", "v", "k_norm"))


def _of_layers(fields: Fields, name: str, layers: int) -> list[int]:
    """A size for each layer, of one for all or an array."""
    given = fields.get(name)
    if not isinstance(given, np.ndarray):
        return [fields.whole(name)] * layers
    if given.shape != (layers,) or not np.issubdtype(given.dtype, np.integer):
        refuse(fields.place(name), f"a size for each of the {layers} layers", f"{given}"[:100])
    return [whole(size, fields.place(name)) for size in given.tolist()]


def _prepare(fields: Fields, every: int | None, shared: int) -> dict[str, Json]:
    """What both have; of feed-forwards, the size of the first layer is put in the file's place.

    Args:
        fields: of the file.
        every, shared: where it says nothing: the last of so many layers has no window; layers, the
            last, that read the keys of others.
    """
    layers, name = fields.whole("block_count"), "attention.shared_kv_layers"
    windows = read_pattern(fields, layers, every)
    sizes = _of_layers(fields, "feed_forward_length", layers)
    told = fields.get(name, shared)
    if isinstance(told, float) and told.is_integer():  # as some files have it
        told = int(told)
    fields.values = {**fields.values, "feed_forward_length": sizes[0], name: told}
    base = fields.positive("rope.freq_base_swa", 10000.0)
    return {
        "activation": "gelu_tanh",
        "norm_placement": "around",
        "attention_scale": 1.0,
        "head_norm": "rms",
        "value_norm": True,
        "embedding_scale": fields.whole("embedding_length") ** 0.5,
        "shared_layers": read_count(fields, name, shared),
        "feed_forward_sizes": () if len({*sizes}) == 1 else tuple(sizes),
        "local_rope_base": None if windows["window"] is None else base,
        **windows,
    }


def _share(scale: float) -> float:
    """The share of features below a quantile, as the shortest decimal that it is."""
    share = (1 + math.erf(scale / math.sqrt(2))) / 2
    shortest = (round(share, digits) for digits in range(7))
    # written from float32, in which the share is rounded by up to 3e-8, as the quantile is
    return next((x for x in shortest if abs(x - share) < 1e-7), share)


def _prepare_3n(fields: Fields) -> dict[str, Json]:
    layers, name = fields.whole("block_count"), "activation_sparsity_scale"
    scales = fields.get(name)
    if (
        not isinstance(scales, np.ndarray)
        or scales.shape != (layers,)
        or not np.issubdtype(scales.dtype, np.floating)
        or not (scales < 5).all()  # nor NaN; 5 is the quantile of all features but 3e-7
    ):
        wanted = f"quantiles below 5 for each of the {layers} layers"
        refuse(fields.place(name), wanted, f"{scales}"[:100])
    shares = tuple(_share(scale) for scale in scales.tolist())
    return {
        **_prepare(fields, 5, max(layers - 20, 0)),
        "sparsities": shares if any(shares) else (),
        "streams": fields.whole("altup.num_inputs", 4),
        "active_stream": read_count(fields, "altup.active_idx", 0),
        "stream_scale": True,
        "laurel_size": 64,
        "logit_cap": fields.positive("final_logit_softcapping", 30.0),
    }


def _read_inputs(
    fields: Fields, sizes: dict[str, Json], tensors: Collection[str]
) -> dict[str, Json]:
    size = read_count(fields, "embedding_length_per_layer_input", 256)
    return {"layer_embedding_size": size, "layer_vocabulary": sizes["vocabulary"] if size else 0}


def _prepare_4(fields: Fields) -> dict[str, Json]:
    """Sizes of heads in layers without a window are put in the place of those with."""
    layers, pattern = fields.whole("block_count"), "attention.sliding_window_pattern"
    if not isinstance(fields.values.get(pattern), np.ndarray):
        wanted = f"true or false for each of the {layers} layers"
        refuse(fields.place(pattern), wanted, fields.get(pattern))
    common = _prepare(fields, None, 0)
    near = common["window_layers"] or (common["window"] is not None,) * layers
    heads = _of_layers(fields, "attention.head_count_kv", layers)
    kinds = [
        {n for n, local in zip(heads, near, strict=True) if local is kind} for kind in (False, True)
    ]
    if max(map(len, kinds)) > 1:
        wanted = "one number in layers with a window, and one in the others"
        refuse(fields.place("attention.head_count_kv"), wanted, heads)
    K, local_K = (next(iter(kind), heads[0]) for kind in kinds)
    D, local_D = (fields.whole(f"attention.key_length{kind}") for kind in ("", "_swa"))
    same = ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")
    for name in same:
        if fields.get(name, local_D) != local_D:
            wanted = f"{local_D}, the size of a head in layers with a window"
            refuse(fields.place(name), wanted, fields.get(name))
    replaced = {"attention.head_count_kv": K, **dict.fromkeys(same, D)}
    fields.values = {**fields.values, **replaced}
    return {
        **common,
        "local_head_size": local_D if any(near) and local_D != D else None,
        "local_kv_heads": local_K if any(near) and local_K != K else None,
        "logit_cap": fields.positive("final_logit_softcapping", None),
    }


def _read_4(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    blocks, experts = [f"blk.{i}.attn_" for i in range(sizes["layers"])], {}
    if fields.get("expert_count", 0) != 0:
        experts = {
            "experts": fields.whole("expert_count"),
            "experts_per_token": fields.whole("expert_used_count"),
            "expert_size": fields.whole("expert_feed_forward_length"),
            "shared_size": sizes["feed_forward"],
            "experts_apart": True,
        }
    for name in ("expert_used_count", "expert_feed_forward_length"):
        fields.get(name)  # of files without experts too
    return {
        **_read_inputs(fields, sizes, tensors),
        **experts,
        "key_values": any(
            f"{block}k.weight" in tensors and f"{block}v.weight" not in tensors for block in blocks
        ),
        "layer_scale": "blk.0.layer_output_scale.weight" in tensors,
    }


GEMMAS = {
    "gemma3n": Gguf(
        _read_inputs,
        {**TENSORS, **INPUTS, **STREAMS},
        base=1e6,
        prepare=_prepare_3n,
        arrays=(*OF_LAYERS, "activation_sparsity_scale"),
        unused=_unused,
    ),
    "gemma4": Gguf(
        _read_4,
        {**TENSORS, **INPUTS, **MIXTURE},
        (
            halves("blk.{}.ffn_gate_up_exps.weight"),
            of_experts("layers.{}.down", "blk.{}.ffn_down_exps.weight"),
            of_experts("layers.{}.feed_forward_norm", "blk.{}.pre_ffw_norm_2.weight"),
        ),
        base=1e6,
        prepare=_prepare_4,
        arrays=(*OF_LAYERS, "attention.head_count_kv"),
        proportional=True,
        unused=_unused,
    ),
}
