"""The metadata of a GGUF file to Config."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import layers
from ..transformer import Config
from .catalogue import family_of
from .tables import check_neutral, configure, positive, refuse, scaling, whole

STRETCH = "rope_freqs.weight"  # a GGUF tensor: what each rotary frequency is divided by


def read_metadata(metadata: Mapping[str, Any], vocabulary: int, tied: bool, stretch: Tensor | None = None) -> Config:
    """The Config that the metadata of a GGUF file describes.

    Here any field of the architecture that is not known is refused, since nearly all of them are mathematics.

    Args:
        metadata: names to values.
        vocabulary: rows of the embedding; the metadata need not say.
        tied: whether the file has no head of its own.
        stretch: (D / 2,), the tensor `rope_freqs.weight`, or None. It is kept only if it is that of a llama3 RopeScaling.
    """
    family = family_of(metadata.get("general.architecture"), "general.architecture")
    prefix = f"{family.name}."
    values = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            refuse(prefix + name, "one value for all layers", "an array")
    check_neutral(values, family.gguf_neutral, prefix + "{}")
    others = {"vocab_size", "attention.value_length", "attention.layer_norm_rms_epsilon", "tensor_data_layout"}
    others |= {"rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"}
    others |= {"rope.scaling.original_context_length", "rope.scaling.finetuned"}  # read by YaRN only, which is refused
    for name in values.keys() - others - family.gguf_neutral.keys() - set(family.gguf_sizes.values()):
        refuse(prefix + name, "absent", values[name])

    heads = whole(values.get("attention.head_count"), prefix + "attention.head_count")
    width = whole(values.get("embedding_length"), prefix + "embedding_length")
    values = {"attention.head_count_kv": heads, "attention.key_length": width // heads, **values}
    head_size = values["attention.key_length"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if values.get(name, head_size) != head_size:
            refuse(prefix + name, f"{head_size}, the size of a head", values[name])
    base = positive(values.get("rope.freq_base", 10000.0), prefix + "rope.freq_base")
    kind = values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        refuse(prefix + "rope.scaling.type", "none or linear", kind)
    stretched = None
    if kind == "linear":
        stretched = scaling("linear", positive(values.get("rope.scaling.factor"), prefix + "rope.scaling.factor"))
    config = configure(
        vocabulary=vocabulary,
        **{ours: whole(values.get(theirs), prefix + theirs) for ours, theirs in family.gguf_sizes.items()},
        norm_epsilon=positive(values.get("attention.layer_norm_rms_epsilon"), prefix + "attention.layer_norm_rms_epsilon"),
        rope_base=base,
        rope_scaling=stretched,
        tied=tied,
    )
    return config if stretch is None else _stretched(config, stretch)


def _stretched(config: Config, stretch: Tensor) -> Config:
    """A file of Llama 3.1 and later holds what its rotary frequencies are divided by, not the numbers that they follow from."""
    D, base = config.head_size, config.rope_base
    if stretch.shape == (D // 2,) and config.rope_scaling is None and 0 < float(stretch.max()) < math.inf:
        llama3 = scaling("llama3", float(stretch.max()))
        wanted = layers.frequencies(D, base=base) / layers.frequencies(D, base=base, scaling=llama3)
        if torch.allclose(stretch.float(), wanted, rtol=1e-4):  # computed in float32 from wavelengths, by another program
            return replace(config, rope_scaling=llama3)
    refuse(STRETCH, "the factors of Llama 3 with low 1, high 4 and 8192 positions", f"{tuple(stretch.shape)} other numbers")
