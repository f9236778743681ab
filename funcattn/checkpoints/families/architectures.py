"""What each architecture of GGUF files is: the names of its tensors, how they are stored, and the
fields of Config that its file says, or that are always so.

What an architecture always does is not in its files (llama.cpp has it in its source): it is in the
table here. Where llama.cpp computes otherwise than the original (the exact gelu of Pythia, the
untruncated yarn of gpt-oss), the original is followed.

Source: github.com/ggml-org/llama.cpp, docs of the GGUF keys and convert_hf_to_gguf.py.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...transformer import Config
from .gguf_tensors import BETWEEN, EXPERTS, GATE_UP, SHARED_ROUTER, TENSORS, qkv
from .tables import Fields, Json, Pack, refuse

RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"

Read = Callable[[Fields, dict[str, Json], Collection[str]], dict[str, Json]]


@dataclass(frozen=True)
class Gguf:
    """How one architecture is spelled in GGUF.

    read: (fields, sizes, names of the tensors) -> what Config has besides the sizes.
    tensors, packs: as in Family.
    rotated: leaves whose rows are ordered for rotary angles on neighbouring features.
    offset: what was added to norm weights.
    base: of the rotary frequencies where nothing is said.
    epsilon: the field of the norms' epsilon.
    partial: whether a part of each head may turn.
    truncated: whether the bounds of yarn's ramp are whole numbers.
    prepare: (fields) -> what Config has, read before the sizes, whose fields it may replace.
    arrays: fields that may have a value for each layer, which `read` or `prepare` checks.
    proportional: whether `rope_freqs.weight` says which planes of layers without a window turn.
    unused: a Config -> names of tensors that files may have beside those of its leaves.
    other: a tensor, and how files that have it are spelled.
    """

    read: Read = lambda fields, sizes, tensors: {}
    tensors: Mapping[str, str] = field(default_factory=lambda: TENSORS)
    packs: tuple[Pack, ...] = ()
    rotated: tuple[str, ...] = ()
    offset: float = 0.0
    base: float = 10000.0
    epsilon: str = RMS
    partial: bool = False
    truncated: bool = True
    prepare: Callable[[Fields], dict[str, Json]] = lambda fields: {}
    arrays: tuple[str, ...] = ("attention.sliding_window_pattern",)
    proportional: bool = False
    unused: Callable[[Config], frozenset[str]] = lambda config: frozenset()
    other: "tuple[str, Gguf] | None" = None

    def spelling(self, tensors: Collection[str]) -> "Gguf":
        """The spelling of a file with these tensors."""
        return self if self.other is None or self.other[0] not in tensors else self.other[1]


TURNED = ("q", "k", "q_bias", "k_bias")


# What several architectures read alike.


def _read_biases(tensors: Collection[str]) -> dict[str, Json]:
    """Biases, which are there where the first layer has them."""
    return {
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "feed_forward_bias": "blk.0.ffn_down.bias" in tensors,
    }


def _read_experts(
    fields: Fields, sizes: Mapping[str, Json], *, normalized: bool = True
) -> dict[str, Json]:
    return {
        "experts": fields.whole("expert_count"),
        "experts_per_token": fields.whole("expert_used_count"),
        "expert_size": fields.whole("expert_feed_forward_length", sizes["feed_forward"]),
        "normalized_routing": fields.flag("expert_weights_norm", normalized),
    }


def read_pattern(
    fields: Fields, layers: int, every: int | None = None, usual: int | None = None
) -> dict[str, Json]:
    """window and window_layers.

    Args:
        layers: how many there are.
        every: the last of so many layers has no window, where the file does not say which; None
            for the window in each layer.
        usual: the window where the file says none.
    """
    pattern = fields.get("attention.sliding_window_pattern", every)
    where = fields.place("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != np.bool_ or pattern.shape != (layers,):
            refuse(where, f"true or false for each of the {layers} layers", f"{pattern}"[:100])
        local = tuple(pattern.tolist())
    else:
        period = (
            layers + 1
            if pattern is None
            else fields.whole("attention.sliding_window_pattern", every)
        )
        local = tuple(bool((i + 1) % period) for i in range(layers))
    window = fields.whole("attention.sliding_window", *([] if usual is None else [usual]))
    if not any(local):
        return {"window": None, "window_layers": ()}
    return {"window": window, "window_layers": () if all(local) else local}


def _read_window(fields: Fields) -> int | None:
    """The window of every layer; 0 is none."""
    window = fields.get("attention.sliding_window", 0)
    return None if window in (0, None) else fields.whole("attention.sliding_window")


def _read_scale(fields: Fields, name: str) -> float | None:
    """A factor; 0 is none."""
    return None if fields.get(name, 0.0) == 0 else fields.positive(name)


# The architectures.


def _llama(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    mixture = fields.values.get("expert_count", 0) != 0
    return {**_read_biases(tensors), **(_read_experts(fields, sizes) if mixture else {})}


def _smollm3(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    turns = tuple((i + 1) % 4 != 0 for i in range(sizes["layers"]))
    return {**_read_biases(tensors), "rotary_layers": () if all(turns) else turns}


def _granite(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    divisor = _read_scale(fields, "logit_scale")
    return {
        **_llama(fields, sizes, tensors),
        "attention_scale": _read_scale(fields, "attention.scale"),
        "embedding_scale": _read_scale(fields, "embedding_scale") or 1.0,
        "residual_scale": _read_scale(fields, "residual_scale") or 1.0,
        "logit_scale": 1.0 if divisor is None else 1 / divisor,
    }


def _olmo2(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    """Olmo 2 and 3; the layers of 3 with a window turn without scaling."""
    windows = {}
    if fields.says("attention.sliding_window"):
        windows = read_pattern(fields, sizes["layers"], 4)
    return {
        "norm_placement": "after",
        "head_norm": "rms_width",
        **windows,
        "local_rope_base": sizes["rope_base"]
        if windows.get("window") and sizes["rope_scaling"] is not None
        else None,
    }


def _gemma(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    return {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "embedding_scale": sizes["width"] ** 0.5,
    }


def _around(sizes: dict[str, Json], largest: int) -> dict[str, Json]:
    """Gemma 2 and 3; the largest of each, known by its number of layers, divides logits by sqrt(E /
    H) instead of sqrt(D).
    """
    size = sizes["width"] / sizes["heads"] if sizes["layers"] == largest else sizes["head_size"]
    return {"norm_placement": "around", "attention_scale": size**-0.5}


def _gemma2(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    return {
        **_gemma(fields, sizes, tensors),
        **_around(sizes, largest=46),
        "attention_cap": fields.positive("attn_logit_softcapping", 50.0),
        "logit_cap": fields.positive("final_logit_softcapping", 30.0),
        **read_pattern(fields, sizes["layers"], 2, 4096),
    }


def _gemma3(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    windows, local = (
        read_pattern(fields, sizes["layers"], 6),
        fields.positive("rope.freq_base_swa", 10000.0),
    )
    return {
        **_gemma(fields, sizes, tensors),
        **_around(sizes, largest=62),
        **windows,
        "head_norm": "rms",
        "local_rope_base": None if windows["window"] is None else local,
    }


def _gpt_oss(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    return {
        **_read_experts(fields, sizes),
        **read_pattern(fields, sizes["layers"], 2, 128),
        "activation": "quick_gelu",
        "activation_limit": 7.0,
        "qkv_bias": True,
        "output_bias": True,
        "feed_forward_bias": True,
        "sinks": True,
        "router_bias": True,
    }


def _qwen2moe(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    """Weights of experts are those of the softmax of all, as llama.cpp has it."""
    return {
        **_read_experts(fields, sizes, normalized=False),
        "qkv_bias": True,
        "shared_size": fields.whole("expert_shared_feed_forward_length", sizes["feed_forward"]),
        "shared_gated": True,
    }


def _glm4(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    return {**_read_biases(tensors), "norm_placement": "around"}


LAYER_NORM = {"norm": "layer", "norm_bias": True}
PLAIN = {"gated": False, "qkv_bias": True, "output_bias": True, "feed_forward_bias": True}


def _gpt2(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    return {**LAYER_NORM, **PLAIN, "positions": "learned", "activation": "gelu_tanh"}


def _gptneox(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    twenty_billion = sizes["layers"] == 44  # GPT-NeoX-20B, the one that has not the exact gelu
    return {
        **LAYER_NORM,
        **PLAIN,
        "activation": "gelu_tanh" if twenty_billion else "gelu",
        "parallel": fields.flag("use_parallel_residual", True),
    }


def _stablelm(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    """As llama.cpp has it, blocks are parallel where there is no norm between them: converters
    write `use_parallel_residual` also where config.json does not.
    """
    fields.flag("use_parallel_residual", True)
    parallel = "blk.0.ffn_norm.weight" not in tensors
    return {
        **LAYER_NORM,
        "parallel": parallel,
        "shared_norm": parallel,
        "head_norm": "layer" if "blk.0.attn_q_norm.weight" in tensors else "none",
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
    }


def _starcoder2(
    fields: Fields, sizes: dict[str, Json], tensors: Collection[str]
) -> dict[str, Json]:
    return {**LAYER_NORM, **_read_biases(tensors), "gated": False, "activation": "gelu_tanh"}


def _command_r(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    return {
        **_read_biases(tensors),
        "norm": "layer",
        "parallel": True,
        "shared_norm": True,
        "head_norm": "layer" if "blk.0.attn_q_norm.weight" in tensors else "none",
        "logit_scale": _read_scale(fields, "logit_scale") or 1.0,
    }


def _cohere2(fields: Fields, sizes: dict[str, Json], tensors: Collection[str]) -> dict[str, Json]:
    """Layers without a window do not turn."""
    windows = read_pattern(fields, sizes["layers"], 4)
    return {
        **_command_r(fields, sizes, tensors),
        **windows,
        "rotary_layers": windows["window_layers"],
    }


GGUF = {
    "llama": Gguf(_llama, packs=EXPERTS, rotated=TURNED),
    "smollm3": Gguf(_smollm3, rotated=TURNED, base=2e6),
    "granite": Gguf(_granite, rotated=TURNED),
    "granitemoe": Gguf(_granite, packs=EXPERTS, rotated=TURNED),
    "qwen2": Gguf(lambda fields, sizes, tensors: {"qkv_bias": True}),
    "qwen2moe": Gguf(_qwen2moe, packs=(*EXPERTS, SHARED_ROUTER)),
    "qwen3": Gguf(lambda fields, sizes, tensors: {"head_norm": "rms"}),
    "qwen3moe": Gguf(
        lambda fields, sizes, tensors: {"head_norm": "rms", **_read_experts(fields, sizes)},
        packs=EXPERTS,
    ),
    "olmo2": Gguf(_olmo2),
    "olmoe": Gguf(
        lambda fields, sizes, tensors: {
            "head_norm": "rms_width",
            **_read_experts(fields, sizes, normalized=False),
        },
        packs=EXPERTS,
    ),
    "seed_oss": Gguf(lambda fields, sizes, tensors: _read_biases(tensors), BETWEEN),
    "gemma": Gguf(_gemma, offset=1.0),
    "gemma2": Gguf(_gemma2, offset=1.0),
    "gemma3": Gguf(_gemma3, offset=1.0, base=1e6),
    "phi3": Gguf(
        lambda fields, sizes, tensors: {"window": _read_window(fields)},
        packs=(*qkv("weight"), GATE_UP),
        partial=True,
    ),
    "glm4": Gguf(_glm4, packs=(GATE_UP,), rotated=TURNED, partial=True),
    "gpt-oss": Gguf(_gpt_oss, BETWEEN, EXPERTS, base=150000.0, truncated=False),
    "command-r": Gguf(
        _command_r, rotated=(*TURNED, "q_norm", "k_norm"), base=500000.0, epsilon=LAYER
    ),
    "cohere2": Gguf(_cohere2, rotated=TURNED, epsilon=LAYER),
    "stablelm": Gguf(_stablelm, epsilon=LAYER, partial=True),
    "starcoder2": Gguf(_starcoder2, epsilon=LAYER),
    "gpt2": Gguf(_gpt2, packs=qkv("weight", "bias"), epsilon=LAYER),
    "gptneox": Gguf(_gptneox, packs=qkv("weight", "bias"), epsilon=LAYER, partial=True),
}
