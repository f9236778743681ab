"""The metadata of a GGUF file to Config, for the families that are found in such files: llama,
qwen2, qwen3, gemma, gemma2, gemma3.

What a family always does is not in its metadata (llama.cpp has it in its source): it is in the
table here.

Source: github.com/ggml-org/llama.cpp, docs of the GGUF keys and convert_hf_to_gguf.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import layers
from ...layers import RopeScaling
from ...transformer import Config
from .tables import Json, check_neutral, configure, positive, refuse, whole

STRETCH = "rope_freqs.weight"  # a GGUF tensor: what each rotary frequency is divided by

SIZES = {
    "width": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
    "feed_forward": "feed_forward_length",
    "context": "context_length",
}
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.max_alibi_bias": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
}
OF_A_HEAD = (
    "attention.value_length",
    "rope.dimension_count",
    "attention.key_length_swa",
    "attention.value_length_swa",
)
OF_A_HEAD += ("rope.dimension_count_swa",)
IGNORED = {
    *("vocab_size", "attention.layer_norm_rms_epsilon", "tensor_data_layout", *OF_A_HEAD),
    *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
    # read by YaRN only, which is refused
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
TENSORS = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layers.{}.attention_norm": "blk.{}.attn_norm.weight",
    "layers.{}.q": "blk.{}.attn_q.weight",
    "layers.{}.k": "blk.{}.attn_k.weight",
    "layers.{}.v": "blk.{}.attn_v.weight",
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.q_bias": "blk.{}.attn_q.bias",
    "layers.{}.k_bias": "blk.{}.attn_k.bias",
    "layers.{}.v_bias": "blk.{}.attn_v.bias",
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.{}.attention_after_norm": "blk.{}.post_attention_norm.weight",
    "layers.{}.feed_forward_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.feed_forward_after_norm": "blk.{}.post_ffw_norm.weight",
    "layers.{}.gate": "blk.{}.ffn_gate.weight",
    "layers.{}.up": "blk.{}.ffn_up.weight",
    "layers.{}.down": "blk.{}.ffn_down.weight",
}


def _gemma(values: Mapping[str, object], config: dict[str, Json]) -> dict[str, Json]:
    return {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "embedding_scale": config["width"] ** 0.5,
    }


def _around(values: Mapping[str, object], config: dict[str, Json], largest: int) -> dict[str, Json]:
    """Gemma 2 and 3; the largest of each, known by its number of layers, divides logits by sqrt(E /
    H) instead of sqrt(D).
    """
    size = config["width"] / config["heads"] if config["layers"] == largest else config["head_size"]
    return {**_gemma(values, config), "norm_placement": "around", "attention_scale": size**-0.5}


def _gemma2(values: Mapping[str, object], config: dict[str, Json]) -> dict[str, Json]:
    return {
        **_around(values, config, largest=46),
        "attention_cap": positive(
            values.get("attn_logit_softcapping", 50.0), "gemma2.attn_logit_softcapping"
        ),
        "logit_cap": positive(
            values.get("final_logit_softcapping", 30.0), "gemma2.final_logit_softcapping"
        ),
        **_windows(values, 2, config["layers"], "gemma2", 4096),
    }


def _gemma3(values: Mapping[str, object], config: dict[str, Json]) -> dict[str, Json]:
    windows = _windows(values, 6, config["layers"], "gemma3")
    base = positive(values.get("rope.freq_base_swa", 10000.0), "gemma3.rope.freq_base_swa")
    return {
        **_around(values, config, largest=62),
        **windows,
        "head_norm": "rms",
        "local_rope_base": base,
    }


def _windows(
    values: Mapping[str, object], every: int, layers: int, name: str, usual: int | None = None
) -> dict[str, Json]:
    every = whole(
        values.get("attention.sliding_window_pattern", every),
        f"{name}.attention.sliding_window_pattern",
    )
    local = tuple(bool((i + 1) % every) for i in range(layers))
    window = whole(
        values.get("attention.sliding_window", usual), f"{name}.attention.sliding_window"
    )
    return {"window": window, "window_layers": () if all(local) else local}


@dataclass(frozen=True)
class Gguf:
    """How one family is spelled in GGUF: what Config has besides the sizes, the fields that it
    reads, how its leaves are stored.

    rotated: leaves whose rows are ordered for rotary angles on neighbouring features. offset: what
    was added to norm weights. base: of the rotary frequencies where nothing is said.
    """

    more: Callable[[Mapping[str, object], dict[str, Json]], dict[str, Json]] = (
        lambda values, config: {}
    )
    reads: frozenset[str] = frozenset()
    rotated: tuple[str, ...] = ()
    offset: float = 0.0
    base: float = 10000.0


WINDOWS = frozenset(["attention.sliding_window", "attention.sliding_window_pattern"])
GGUF = {
    "llama": Gguf(rotated=("q", "k")),
    "qwen2": Gguf(lambda values, config: {"qkv_bias": True}),
    "qwen3": Gguf(lambda values, config: {"head_norm": "rms"}),
    "gemma": Gguf(_gemma, offset=1.0),
    "gemma2": Gguf(
        _gemma2, WINDOWS | {"attn_logit_softcapping", "final_logit_softcapping"}, offset=1.0
    ),
    "gemma3": Gguf(_gemma3, WINDOWS | {"rope.freq_base_swa"}, offset=1.0, base=1e6),
}


def read_metadata(
    metadata: Mapping[str, object], vocabulary: int, tied: bool, stretch: Tensor | None = None
) -> Config:
    """The Config that the metadata of a GGUF file describes.

    Here any field of the architecture that is not known is refused, since nearly all of them are
    mathematics.

    Args:
        metadata: names to values.
        vocabulary: rows of the embedding; the metadata need not say.
        tied: whether the file has no head of its own.
        stretch: (D / 2,), the tensor `rope_freqs.weight`, or None. It is kept only if it is that of
            a llama3 RopeScaling.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF:
        refuse("general.architecture", f"one of {', '.join(GGUF)}", name)
    family, prefix = GGUF[name], f"{name}."
    values = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    for key, value in values.items():
        if not isinstance(value, str | int | float):
            refuse(prefix + key, "one value for all layers", "an array")
    neutral = {key: allowed for key, allowed in NEUTRAL.items() if key not in family.reads}
    check_neutral(values, neutral, prefix + "{}")
    for key in values.keys() - IGNORED - neutral.keys() - family.reads - set(SIZES.values()):
        refuse(prefix + key, "absent", values[key])

    heads = whole(values.get("attention.head_count"), prefix + "attention.head_count")
    width = whole(values.get("embedding_length"), prefix + "embedding_length")
    values = {"attention.head_count_kv": heads, "attention.key_length": width // heads, **values}
    head_size = whole(values["attention.key_length"], prefix + "attention.key_length")
    for key in OF_A_HEAD:
        if values.get(key, head_size) != head_size:
            refuse(prefix + key, f"{head_size}, the size of a head", values[key])
    sizes = {ours: whole(values.get(theirs), prefix + theirs) for ours, theirs in SIZES.items()}
    config = configure(
        vocabulary=vocabulary,
        **sizes,
        norm_epsilon=positive(
            values.get("attention.layer_norm_rms_epsilon"),
            prefix + "attention.layer_norm_rms_epsilon",
        ),
        rope_base=positive(values.get("rope.freq_base", family.base), prefix + "rope.freq_base"),
        rope_scaling=_scaling(values, prefix),
        tied=tied,
        **family.more(values, sizes),
    )
    return config if stretch is None else _stretched(config, stretch)


def _scaling(values: Mapping[str, object], prefix: str) -> RopeScaling | None:
    # as llama.cpp takes a factor alone
    usual = "linear" if "rope.scaling.factor" in values else "none"
    kind = values.get("rope.scaling.type", usual)
    if kind not in ("none", "linear"):
        refuse(prefix + "rope.scaling.type", "none or linear", kind)
    if kind == "none":
        return None
    return RopeScaling(
        "linear", positive(values.get("rope.scaling.factor"), prefix + "rope.scaling.factor")
    )


def _stretched(config: Config, stretch: Tensor) -> Config:
    """A file of Llama 3.1 and later holds what its rotary frequencies are divided by, not the
    numbers that they follow from.
    """
    D, base = config.head_size, config.rope_base
    if (
        stretch.shape == (D // 2,)
        and config.rope_scaling is None
        and 0 < float(stretch.max()) < math.inf
    ):
        llama3 = RopeScaling("llama3", float(stretch.max()))
        plain = layers.frequencies(D, base=base, device=stretch.device)
        wanted = plain / layers.frequencies(D, base=base, scaling=llama3, device=stretch.device)
        # computed in float32 from wavelengths, by another program
        if torch.allclose(stretch.float(), wanted, rtol=1e-4):
            return replace(config, rope_scaling=llama3)
    refuse(
        STRETCH,
        "the factors of Llama 3 with low 1, high 4 and 8192 positions",
        f"{tuple(stretch.shape)} other numbers",
    )
