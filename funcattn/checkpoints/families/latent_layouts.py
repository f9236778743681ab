"""How files lay out the matrices of latent attention, as leaves of `transformer.latent`.

Keys and values of each head are rows of one matrix. The features that turn are the last of each
query and of the row of a token, in most families in pairs of neighbours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...transformer import Config
from .layouts import half_split, interleave
from .llama_variants import LAYER
from .tables import Pack


def _keys_and_values() -> Pack:
    """Keys and values that are made of the latent, head by head in one matrix."""

    def parts(config: Config) -> list[int]:
        D, Dv = config.head_sizes
        return [D - (config.rotary_size or 0), Dv]

    def unpack(config: Config, tensors: list[Tensor]) -> list[Tensor]:
        heads = tensors[0].unflatten(0, (config.heads, -1)).split(parts(config), 1)
        return [part.flatten(0, 1).contiguous() for part in heads]

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        heads = [leaf.unflatten(0, (config.heads, -1)) for leaf in leaves]
        return [torch.cat(heads, 1).flatten(0, 1)]

    names = (LAYER + "self_attn.kv_b_proj.weight",)
    return Pack(("layers.{}.k", "layers.{}.v"), names, unpack, pack)


def _neighbours(
    path: str, name: str, block: Callable[[Config], int], applies: Callable[[Config], bool]
) -> Pack:
    """A leaf whose last rotary_size rows of each block turn in pairs of neighbours in the file."""

    def reorder(order: Callable[[Tensor, int], Tensor], config: Config, x: Tensor) -> Tensor:
        turning = config.rotary_size or 0
        size = block(config)
        rows = x.reshape(-1, size, *x.shape[1:])
        plain, turned = rows.split([size - turning, turning], 1)
        flat = turned.reshape(-1, 1, *turned.shape[2:]).flatten(0, 1)
        flat = flat if flat.dim() > 1 else flat.unsqueeze(-1)
        return torch.cat([plain, order(flat, turning).reshape(turned.shape)], 1).reshape(x.shape)

    return Pack(
        (path,),
        (LAYER + name,),
        lambda config, x: [reorder(half_split, config, x[0])],
        lambda config, x: [reorder(interleave, config, x[0])],
        lambda config, layer: applies(config),
    )


NAMES = {
    f"layers.{{}}.{ours}": f"{LAYER}self_attn.{theirs}"
    for ours, theirs in (
        ("q_down", "q_a_proj.weight"),
        ("q_down_bias", "q_a_proj.bias"),
        ("q_down_norm", "q_a_layernorm.weight"),
        ("kv_down", "kv_a_proj_with_mqa.weight"),
        ("kv_down_bias", "kv_a_proj_with_mqa.bias"),
        ("kv_down_norm", "kv_a_layernorm.weight"),
    )
}
_LOW = Pack(
    ("layers.{}.q",),
    (LAYER + "self_attn.q_b_proj.weight",),
    lambda _, x: x,
    lambda _, x: x,
    lambda config, layer: bool(config.query_latent_size),
)
_of_head, _of_row = (lambda config: config.head_size), (lambda config: config.cached[1])
PLAIN_ANGLES = (_keys_and_values(), _LOW)
TURNED = (
    _keys_and_values(),
    _neighbours(
        "layers.{}.q",
        "self_attn.q_b_proj.weight",
        _of_head,
        lambda config: bool(config.query_latent_size),
    ),
    _neighbours("layers.{}.q", "self_attn.q_proj.weight", _of_head, lambda config: True),
    *(
        _neighbours(
            f"layers.{{}}.kv_down{ours}",
            f"self_attn.kv_a_proj_with_mqa.{theirs}",
            _of_row,
            lambda config: True,
        )
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
    ),
)
