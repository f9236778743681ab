"""The metadata of a GGUF file to Config, for the architectures of `architectures`.

Source: github.com/ggml-org/llama.cpp, docs of the GGUF keys and convert_hf_to_gguf.py.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ... import layers
from ...layers import RopeScaling
from ...transformer import Config
from .architectures import Gguf
from .latent_gguf import ARCHITECTURES
from .tables import Fields, Json, check_neutral, configure, refuse

STRETCH = "rope_freqs.weight"  # a GGUF tensor: what each rotary frequency is divided by
# the same for texts within and beyond the trained context (longrope)
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"

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
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # what is usual, and the softmax that is
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.max_alibi_bias": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "nextn_predict_layers": (0,),
    "leading_dense_block_count": (0,),
}
OF_A_HEAD = (
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
)
# what says nothing of the mathematics, or is read by yarn and longrope alone
IGNORED = {
    *("vocab_size", "tensor_data_layout"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}


def read_metadata(
    metadata: Mapping[str, object],
    vocabulary: int,
    tied: bool,
    stretch: Tensor | None = None,
    *,
    factors: tuple[Tensor, Tensor] | None = None,
    tensors: Collection[str] = (),
) -> Config:
    """The Config that the metadata of a GGUF file describes.

    Here any field of the architecture that is not known is refused, since nearly all of them are
    mathematics.

    Args:
        metadata: names to values.
        vocabulary: rows of the embedding; the metadata need not say.
        tied: whether the file has no head of its own.
        stretch: (D / 2,), the tensor `rope_freqs.weight`, or None. It is kept only if it is that of
            a llama3 RopeScaling, or of a proportional one where the architecture has these.
        factors: the tensors `rope_factors_short.weight` and `rope_factors_long.weight`, or None.
        tensors: the names of the tensors of the file: biases and norms that an architecture may
            have are those that are there.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        refuse("general.architecture", f"one of {', '.join(ARCHITECTURES)}", name)
    family, prefix = ARCHITECTURES[name], f"{name}."
    values = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    for key, value in values.items():
        kinds = str | int | float | np.ndarray if key in family.arrays else str | int | float
        if not isinstance(value, kinds):
            refuse(prefix + key, "one value for all layers", "an array")
    fields = Fields(values, prefix + "{}")
    ahead = family.prepare(fields)
    sizes = {"vocabulary": vocabulary, **_read_sizes(fields)}
    sizes["rope_base"] = fields.positive("rope.freq_base", family.base)
    rotary = _read_rotary_size(fields, sizes["head_size"], family.partial)
    sizes["rope_scaling"] = _read_scaling(fields, sizes["context"], family, factors)
    more = family.read(fields, sizes, tensors)
    epsilon = fields.positive(family.epsilon)

    left = {key: value for key, value in values.items() if key not in fields.seen}
    check_neutral(left, NEUTRAL, prefix + "{}")
    for key in left.keys() - IGNORED - NEUTRAL.keys():
        refuse(prefix + key, "absent", left[key])
    config = configure(
        **sizes,
        rotary_size=rotary,
        norm_epsilon=epsilon,
        tied=tied,
        **ahead,
        **more,
    )
    if family.proportional and (config.window is None or config.window_layers):
        return _proportional(config, stretch)
    return config if stretch is None else _stretched(config, stretch)


def _read_sizes(fields: Fields) -> dict[str, Json]:
    heads, width = fields.whole("attention.head_count"), fields.whole("embedding_length")
    usual = {"kv_heads": (heads,), "head_size": (width // heads,)}
    sizes = {ours: fields.whole(theirs, *usual.get(ours, ())) for ours, theirs in SIZES.items()}
    for key in OF_A_HEAD:
        if fields.get(key, sizes["head_size"]) != sizes["head_size"]:
            refuse(fields.place(key), f"{sizes['head_size']}, the size of a head", fields.get(key))
    return sizes


def _read_rotary_size(fields: Fields, head_size: int, partial: bool) -> int | None:
    """The features of a head that turn; None for all."""
    turning = fields.whole("rope.dimension_count", head_size)
    if (turning != head_size and not partial) or turning > head_size or turning % 2:
        wanted = "an even number up to" if partial else "the size of a head,"
        refuse(fields.place("rope.dimension_count"), f"{wanted} {head_size}", turning)
    if fields.get("rope.dimension_count_swa", turning) != turning:
        swa = "rope.dimension_count_swa"
        refuse(fields.place(swa), f"{turning}, as in other layers", fields.get(swa))
    return None if turning == head_size else turning


def _read_scaling(
    fields: Fields, context: int, family: Gguf, factors: tuple[Tensor, Tensor] | None
) -> RopeScaling | None:
    # as llama.cpp takes a factor alone, and factors alone
    usual = "longrope" if factors else "linear" if fields.says("rope.scaling.factor") else "none"
    kind = fields.get("rope.scaling.type", usual)
    if kind not in ("none", "linear", "yarn", "longrope"):
        refuse(fields.place("rope.scaling.type"), "none, linear, yarn or longrope", kind)
    if (kind == "longrope") != (factors is not None):
        there = "none of this name" if factors is None else f"them beside {kind}"
        refuse(f"{SHORT} and {LONG}", "there for longrope, and for nothing else", there)
    if kind == "none":
        fields.get("rope.scaling.factor")
        return None
    if kind == "linear":
        return RopeScaling("linear", fields.positive("rope.scaling.factor"))
    original = fields.whole("rope.scaling.original_context_length", context)
    if factors is not None:
        short, long = (_listed(table) for table in factors)
        fields.get("rope.scaling.factor")
        attention = fields.positive("rope.scaling.attn_factor", 1.0)
        if len(short) != len(long):
            refuse(LONG, f"as long as {SHORT}, {len(short)}", len(long))
        return RopeScaling(
            "longrope", context=original, attention=attention, short=short, long=long
        )
    factor = fields.positive("rope.scaling.factor")
    return RopeScaling(
        "yarn",
        factor,
        context=original,
        fast=fields.positive("rope.scaling.yarn_beta_fast", 32.0),
        slow=fields.positive("rope.scaling.yarn_beta_slow", 1.0),
        truncate=family.truncated,
        attention=0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
    )


def _listed(table: Tensor) -> tuple[float, ...]:
    """The factors of longrope, as the decimals that they are closest to."""
    found = tuple(float(str(x)) for x in table.flatten().float().numpy())
    if not all(1e-30 <= x <= 1e30 for x in found):
        refuse(f"{SHORT} and {LONG}", "positive numbers", "others")
    return found


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


def _proportional(config: Config, stretch: Tensor | None) -> Config:
    """The planes that turn are divided by 1, and come before the others, which are by 1e30."""
    D, turning = config.head_size, 0 if stretch is None else int((stretch == 1).sum())
    wanted = torch.tensor([1.0] * turning + [1e30] * (D // 2 - turning))
    if stretch is None or not turning or not torch.equal(stretch.float().cpu(), wanted):
        got = "none" if stretch is None else f"{tuple(stretch.shape)} other numbers"
        refuse(STRETCH, f"({D // 2},), 1 for planes that turn, then 1e30", got)
    # of all pairs; where a quotient is rounded down, half a pair more is the same number of pairs
    shares = 2 * turning / D, (2 * turning + 1) / D
    share = next(x for x in shares if int(x * D // 2) == turning)
    if config.rope_scaling is not None:
        refuse("rope.scaling.type", f"none beside {STRETCH}", config.rope_scaling.kind)
    return replace(config, rope_scaling=RopeScaling("proportional", share=share))
