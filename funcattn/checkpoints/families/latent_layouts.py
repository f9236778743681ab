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

ATTENTION = LAYER + "self_attn."
NAMES = {
    f"layers.{{}}.{ours}": ATTENTION + theirs
    for ours, theirs in (
        ("q_down", "q_a_proj.weight"),
        ("q_down_bias", "q_a_proj.bias"),
        ("q_down_norm", "q_a_layernorm.weight"),
        ("kv_down", "kv_a_proj_with_mqa.weight"),
        ("kv_down_bias", "kv_a_proj_with_mqa.bias"),
        ("kv_down_norm", "kv_a_layernorm.weight"),
    )
}


def keys_and_values(name: str) -> Pack:
    """Keys and values that are made of the latent, head by head in one matrix."""

    def unpack(config: Config, tensors: list[Tensor]) -> list[Tensor]:
        D, Dv = config.head_sizes
        heads = tensors[0].unflatten(0, (config.heads, -1))
        parts = heads.split([D - (config.rotary_size or 0), Dv], 1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        heads = [leaf.unflatten(0, (config.heads, -1)) for leaf in leaves]
        return [torch.cat(heads, 1).flatten(0, 1)]

    return Pack(("layers.{}.k", "layers.{}.v"), (name,), unpack, pack)


def low_rank(config: Config, layer: int) -> bool:
    """True where queries are made of a latent of their own."""
    return config.query_latent_size > 0


def neighbours(path: str, name: str, *, low: bool = False) -> Pack:
    """A leaf whose last rows, of each query or of the row of a token, turn in pairs of neighbours.

    low: True for the name where queries are made of a latent of their own.
    """

    def reorder(order: Callable[[Tensor, int], Tensor], config: Config, x: Tensor) -> Tensor:
        size = config.head_size if path.endswith("q") else config.cached[1]
        turning = config.rotary_size or 0
        plain, turned = x.unflatten(0, (-1, size)).split([size - turning, turning], 1)
        turned = order(turned.flatten(0, 1), turning).view(turned.shape)
        return torch.cat([plain, turned], 1).flatten(0, 1)

    return Pack(
        (path,),
        (name,),
        lambda config, x: [reorder(half_split, config, x[0])],
        lambda config, x: [reorder(interleave, config, x[0])],
        low_rank if low else lambda config, layer: True,
    )


_same = lambda config, x: x
HALVES = (  # of families whose angles are on halves
    keys_and_values(ATTENTION + "kv_b_proj.weight"),
    Pack(("layers.{}.q",), (ATTENTION + "q_b_proj.weight",), _same, _same, low_rank),
)
NEIGHBOURS = (
    HALVES[0],
    neighbours("layers.{}.q", ATTENTION + "q_b_proj.weight", low=True),
    neighbours("layers.{}.q", ATTENTION + "q_proj.weight"),
    neighbours("layers.{}.kv_down", ATTENTION + "kv_a_proj_with_mqa.weight"),
    neighbours("layers.{}.kv_down_bias", ATTENTION + "kv_a_proj_with_mqa.bias"),
)
