"""cos and sin of rotary positions for the operators of layers, read from a table in decode steps.

Angles of a position do not change from token to token, and computing them is a dozen calls of torch
in every step.
"""

import torch
from torch import Tensor

from .. import caches, transformer
from ..core import errors
from ..layers import Rotation
from ..transformer import Config

MOST = 1 << 17  # positions of a table


class Turns:
    """The rotations of a model whose layers rotate alike."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.table: tuple[Tensor, Tensor] | None = None  # of positions 0, 1, ..., a bucket of them

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin, float32 (T, R) each, of positions (T,), which a vmap may map.

        Law: those of `transformer.layer_context`, bit for bit (test_rotations.py).
        """
        known, scaling = errors.peek(positions), self.config.rope_scaling
        if known is None or (scaling is not None and scaling.follows_length):
            return computed(self.config, positions)
        least, last = map(int, known.aminmax())
        if not 0 <= least <= last < MOST:
            return computed(self.config, positions)
        table = self.table  # another thread may replace it by a shorter one
        if table is None or len(table[0]) <= last:
            table = computed(self.config, torch.arange(caches.bucket(last + 1), device="cpu"))
            self.table = table
        cos, sin = table
        return cos[positions], sin[positions]


def computed(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any positions (T,), computed."""
    rotation = transformer.layer_context(
        config, config.layer_spec(0), positions, None, torch.float32, True
    ).rotation
    T = positions.shape[-1]
    if not isinstance(rotation, Rotation):
        none = torch.empty(T, 0, device="cpu")
        return none, none
    cos, sin = (part.reshape(T, -1).contiguous() for part in rotation)
    return cos, sin
