"""All layers as one call of a C++ operator, for weights in tiles: float32, 8 or 4 bits.

A decode step of a small model is thirty layers of thirteen calls each, in which a quantized product
takes a few microseconds: the overhead between calls exceeds the calls. The operator runs what most
models consist of (norms, rotation, attention over a dense cache, a gated feed-forward) from the
first layer to the last; any other model runs as compiled code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

from .. import collectives, layers, transformer
from ..caches import Cache, Delta
from ..layers import Weight
from ..quantization import tiles
from ..quantization.tiles import Tiles, has_row_scale
from ..quantization.tiling import tile_floats
from ..records import is_absent
from ..transformer import ANY, Config, Params, capabilities
from . import mapped
from .pasts import NO_CODES, Codes

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # in the order of the operator's arguments
WEIGHTS = (*MATRICES, "attention_norm", "feed_forward_norm")  # the weights of a layer that it reads

COMPUTES = {  # field of Config -> the values that it computes
    # Sizes, and values used outside of the layers or passed to it as numbers.
    **dict.fromkeys(("vocabulary", "width", "layers", "heads", "kv_heads", "head_size"), ANY),
    **dict.fromkeys(("feed_forward", "context", "tied", "embedding_scale"), ANY),
    **dict.fromkeys(("logit_scale", "logit_cap", "attention_scale", "norm_epsilon"), ANY),
    **dict.fromkeys(("rotary_size", "rope_base", "rope_scaling"), ANY),
    "positions": capabilities.PLACES,
    # Fields of LayerSpec.
    **dict.fromkeys(("window", "window_layers", "rotary_layers", "local_rope_base"), ANY),
    "norm": ("rms",),
    "norm_bias": (False,),
    "norm_offset": (0.0,),
    "norm_placement": ("before",),
    "head_norm": ("none",),
    "qkv_bias": (False,),
    "output_bias": (False,),
    "attention_cap": (None,),
    "sinks": (False,),
    "parallel": (False,),
    "shared_norm": (False,),
    "residual_scale": (1.0,),
    "activation": ("silu",),
    "activation_limit": (None,),
    "gated": (True,),
    "feed_forward_bias": (False,),
    "experts": (0,),
    # Fields of experts, for models without.
    **dict.fromkeys(("experts_per_token", "expert_size", "expert_layers"), ANY),
    **dict.fromkeys(("normalized_routing", "router_bias"), ANY),
    **capabilities.GENERAL,
}
OF_LAYERS = {
    "window": (None,),
    "rotary": ANY,
    "local": (False,),
    "experts": (False,),
    "mixer": ("attention",),
    "feeds": (True,),
    "keys_of": (None,),
    "sparsity": (0.0,),
}
LANES = 16  # the size of a head is a multiple of it
_FIRST = torch.zeros(1, dtype=torch.int64, device="cpu")  # a token id


class Weights(NamedTuple):
    """The weights of all layers as the operators take them: where the matrices are, and the norms.

    plan: int64 of funcattn::plan, the addresses of the matrices, valid as long as these live.
    norms: float32 (2 L + 1, E), before attention and feed-forward of each layer, and the last.
    storages: of the matrices.
    addresses: of the storages, as the plan has them.
    """

    plan: Tensor
    norms: Tensor
    storages: list[UntypedStorage]
    addresses: list[int]

    @property
    def is_moved(self) -> bool:
        """True where a storage has other memory by now; `share_memory_` counts no version."""
        return list(map(UntypedStorage.data_ptr, self.storages)) != self.addresses


def why_not(config: Config, params: Params) -> str:
    """Why the operator does not run these layers, or "" where it does.

    params: of layers whose matrices are in the form of `layers.prepare`, or float32.
    """
    stack = params.layers
    if why := transformer.why_not(config, COMPUTES, OF_LAYERS):
        return why
    if len({config.layer_spec(i) for i in range(config.layers)}) > 1:
        return "it knows layers of one kind, and these differ in their rotation"
    if config.head_size % LANES:
        return (
            f"it knows heads of a multiple of {LANES} features, and these have {config.head_size}"
        )
    for i, layer in enumerate(stack):
        for name in MATRICES:
            if not isinstance(getattr(layer, name), Tiles) and not can_tile(getattr(layer, name)):
                return (
                    tiles.missing()
                    or f"it multiplies matrices of float32, 8 or 4 bits, and layers.{i}.{name} is "
                    f"{_told(getattr(layer, name))}"
                )
            if _rows(getattr(layer, name)) != _rows(getattr(stack[0], name)):
                return (
                    f"it knows layers of the same sizes, and layers.{i}.{name} has other rows than "
                    "that of the first"
                )
        for name, weight in zip(layer._fields, layer, strict=True):
            if name not in WEIGHTS and not is_absent(weight):
                return (
                    f"it adds no biases and has two norms a layer, and there is layers.{i}.{name}"
                )
        if not (
            _is_norm(config, layer.attention_norm) and _is_norm(config, layer.feed_forward_norm)
        ):
            return f"it knows norms with weights of float32, and those of layers.{i} are others"
    if not _is_norm(config, params.norm):
        return "it knows norms with weights of float32, and norm is another"
    if (dtype := layers.embed(params.embedding, _FIRST).dtype) != torch.float32:
        return f"it knows activations of float32, and those of the embedding are {dtype}"
    return ""


def _is_norm(config: Config, weight: Weight) -> bool:
    return (
        isinstance(weight, Tensor)
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.shape == (config.width,)
    )


def can_tile(weight: Weight) -> bool:
    """True for a matrix that `tile_floats` takes."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and not tiles.missing()
    )


def prepare(weight: Weight, rows: int) -> Weight:
    """`layers.prepare`, with float32 matrices in tiles."""
    if can_tile(weight) and (tiled := tile_floats(weight, rows=rows)) is not None:
        return tiled
    return layers.prepare(weight, rows)


def _rows(weight: Weight) -> int:
    return weight.shape[0] if isinstance(weight, Tensor) else weight.rows


def _told(weight: Weight) -> str:
    return (
        f"a matrix of {weight.dtype}"
        if isinstance(weight, Tensor)
        else f"a {type(weight).__name__}"
    )


def weights(params: Params) -> Weights:
    """The weights of layers that the operators run, with matrices in tiles or as they are."""
    norms = [
        norm for layer in params.layers for norm in (layer.attention_norm, layer.feed_forward_norm)
    ]
    all_ = [getattr(layer, name) for layer in params.layers for name in MATRICES]
    tiled = [weight for weight in all_ if isinstance(weight, Tiles)]
    matrices = [weight.blocks if isinstance(weight, Tiles) else weight for weight in all_]
    scales = [weight.scale for weight in tiled if has_row_scale(weight.blocks)]
    with torch._C._AutoDispatchBelowAutograd():
        plan = torch.ops.funcattn.plan(matrices, scales, list(map(_rows, all_)))
    storages = [x.untyped_storage() for x in (*matrices, *scales)]
    addresses = list(map(UntypedStorage.data_ptr, storages))
    return Weights(plan, torch.stack([*norms, params.norm]).detach(), storages, addresses)


def serves(parts: Sequence[Cache]) -> bool:
    """True for a float32 cache on the CPU, not sharded over a mesh."""
    if collectives.axis_size(transformer.TENSOR) > 1:
        return False
    together = lambda rows: (
        rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.stride(-1) == 1
    )
    return all(together(part.k) and together(part.v) for part in parts)


def run(
    config: Config,
    weights: Weights,
    x: Tensor,
    turns: tuple[Tensor, Tensor],
    parts: Sequence[Cache],
    mask: Tensor | None = None,
    codes: Codes = NO_CODES,
) -> tuple[Tensor, Delta]:
    """The residual (T, E) after the last norm, and keys and values (K, T, D) of each.

    turns: cos and sin (T, R) of `rotations.Turns`. mask: bool (T, T), what the new tokens see of
    each other, as in a tree; None is causal. All see the past. Under vmap it is one call for all
    rows, and a past that is not mapped is read once.
    """
    cos, sin = (part[None] for part in turns)
    L = config.layers  # a cache may have more, which store token ids (transformer.lengths)
    keys, values, lengths = (
        [part.k[None, :L] for part in parts],
        [part.v[None, :L] for part in parts],
        [_length(part) for part in parts],
    )
    among = None if mask is None else mask[None].contiguous()
    sizes = config.heads, config.kv_heads, config.scale, config.norm_epsilon
    mapped.register()
    with torch._C._AutoDispatchBelowAutograd():  # no derivatives are taken here
        x, k, v = torch.ops.funcattn.layers.default(
            *(weights.plan, weights.norms, x[None].contiguous(), cos, sin),
            *(keys, values, lengths, among, *sizes, *codes),
        )
    return x[0], Delta(k[0].unbind(0), v[0].unbind(0))


def _length(part: Cache) -> Tensor:
    """int64 (1,), within the rows: that of an overflow under vmap, whose logits are NaN, too."""
    return part.length.reshape(1).long().clamp(0, part.k.shape[-2])
