"""ALiBi: attention with a linear bias, as three more columns of queries and keys.

    S_ij = scale q_i . k_j + m_h (j - i)        m_h = 2 ** (-8 h / H), h = 1 .. H

The columns of a key at position j are the digits j div 256, j mod 256 and 1; those of a query at
position i are m / scale times 256, 1 and -i. So the bias is a part of the product: every kernel
and every cache has it. The digits are exact in every floating dtype up to position 65535, and the
rounding of m i is the same for all keys of a query, which softmax does not see.

Source: Press, Smith and Lewis, Train short, test long, arXiv:2108.12409.
"""

import math

import torch
from torch import Tensor

COLUMNS = 3
BASE = 256


def slopes(heads: int) -> list[float]:
    """The slope of each head; where heads are no power of two, those of the next are interleaved.

    Example:
        >>> slopes(4)
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    known = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (h + 1) / known) for h in range(known)]
    return first + [2.0 ** (-4 * (2 * h + 1) / known) for h in range(heads - known)]


def key_columns(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """(*lead, 1, T, 3) of keys at positions (*lead, T)."""
    digits = (positions // BASE, positions % BASE, torch.ones_like(positions))
    return torch.stack(digits, -1).to(dtype).unsqueeze(-3)


def query_columns(positions: Tensor, slope: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """(*lead, H, T, 3) of queries at positions (*lead, T), for slopes (H,) and a factor of logits.

    Law: attention with these columns is attention with the bias, in every kernel
        (test_alibi.py::test_columns_are_the_bias).
    """
    steep = (slope / scale).unsqueeze(-1)  # (H, 1)
    away = -positions.to(slope.dtype).unsqueeze(-2) * steep  # (*lead, H, T)
    return torch.stack(((steep * BASE).expand_as(away), steep.expand_as(away), away), -1).to(dtype)
