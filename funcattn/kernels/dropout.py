"""Dropout of attention weights from a key: a pure function of (key of the head, query, key), so streaming cannot change it.

Pair (i, j) of head h is kept when the bits of Threefry under fold_in(key, h), at counter i * S + j, fall above the rate. The same
bits come out whatever the block sizes, under vmap, in the backward pass and at every order of derivative.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import randomness


def head_keys(key: Tensor, lead: Sequence[int]) -> Tensor:
    """One key for each leading index and head, (*lead, 1, 2): head h of a flat count gets fold_in(key, h)."""
    return randomness.split(key, math.prod(lead)).reshape(*lead, 1, 2)


def keep(keys: Tensor, line: slice, column: slice, S: int, rate: float) -> Tensor:
    """1 / (1 - rate) where the pair is kept, else 0, float32 (*groups, rows, columns); keys are (*groups, 1, 2)."""
    i = torch.arange(line.start, line.stop, device=keys.device).unsqueeze(-1)
    j = torch.arange(column.start, column.stop, device=keys.device)
    bits = randomness.bits_at(keys.squeeze(-2), i * S + j)
    threshold = math.ceil(rate * 2**32)
    return (bits >= threshold).float() / (1 - rate) if rate < 1 else torch.zeros_like(bits, dtype=torch.float32)
