"""Dropout of attention weights as a pure function of (key, head, query index, key index).

Pair (i, j) of head h is kept where the random word of fold_in(fold_in(key, h), i) at counter j is
at least rate * 2^32. The word is the same for all block sizes, under vmap, in the backward pass and
at every order of derivative.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import randomness


def head_keys(key: Tensor, lead: Sequence[int]) -> Tensor:
    """One key for each leading index and head, (*lead, 1, 2): flat index h gets fold_in(key, h)."""
    # n is a tensor while torch.jit traces
    sizes = (int(n) if isinstance(n, Tensor) else n for n in lead)
    return randomness.split(key, tuple(sizes)).unsqueeze(-2)


def keep(keys: Tensor, q_block: slice, k_block: slice, rate: float) -> Tensor:
    """1 / (1 - rate) where the pair is kept, else 0, float32 (*groups, rows, columns).

    keys are (*groups, 1, 2); q_block and k_block are the ranges of query and key indices.
    """
    count = lambda part: torch.arange(part.start, part.stop, dtype=torch.int32, device=keys.device)
    of_head = keys.movedim(-1, 0).unsqueeze(-1)  # (2, *groups, 1, 1)
    of_row = torch.stack(randomness.encipher(of_head, count(q_block).unsqueeze(-1)))
    x, y = randomness.encipher(of_row, count(k_block))
    word = (x ^ y).long() & randomness.WORD
    return (word >= math.ceil(rate * 2**32)).float() / (1 - rate)
