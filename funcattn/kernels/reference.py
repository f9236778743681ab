"""Dense attention: the specification. Every other kernel is held against this page.

    S_ij = scale * q_i . k_j + bias_ij       over the keys that query i sees
    lse_i = log sum_j exp S_ij               P_ij = exp(S_ij - lse_i)               out_i = sum_j P_ij v_j

O(T * S) memory, plain torch operations, so every transform of torch.func goes through at every order. A query that sees no key
has out = 0 and lse = -inf, with zero derivatives: what such a row would divide by is replaced before the division, not after.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import Mask
from ..records import Attended
from .products import product


class Weights(NamedTuple):
    """P (*lead, H, T, S) and lse (*lead, H, T), in float32 at least."""

    probability: Tensor
    lse: Tensor


def logits(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """scale * q @ k.mT as (*lead, H, T, S), query heads folded into rows so that k is never repeated."""
    H, T, D = q.shape[-3:]
    K = k.shape[-3]
    # torch.unflatten, not the method: torch.compile cannot trace that under a default device
    rows = torch.unflatten(q * scale, -3, (K, H // K)).flatten(-3, -2)  # (*lead, K, G T, D)
    return torch.unflatten(product(rows, k.mT), -2, (H // K, T)).flatten(-4, -3)


def mix(P: Tensor, v: Tensor) -> Tensor:
    """P @ v as (*lead, H, T, Dv), v never repeated for the query heads that share it."""
    H, T = P.shape[-3:-1]
    K = v.shape[-3]
    rows = torch.unflatten(P, -3, (K, H // K)).flatten(-3, -2)
    return torch.unflatten(product(rows, v), -2, (H // K, T)).flatten(-4, -3)


def visible(mask: Mask | Tensor, S: int) -> Tensor:
    """Booleans that broadcast against (*lead, H, T, S)."""
    return mask.dense(S).unsqueeze(-3) if isinstance(mask, Mask) else mask


def weigh(q: Tensor, k: Tensor, mask: Mask | Tensor | None, *, scale: float | Tensor, bias: Tensor | None = None) -> Weights:
    """The attention weights themselves, for those who plot them and for the sums below."""
    S = logits(accurate(q), accurate(k), scale)
    if bias is not None:
        hidden = bias == float("-inf")  # a bias of -inf hides the key, as in torch
        S = S + torch.where(hidden, 0, accurate(bias))
        seen = ~hidden if mask is None else visible(mask, k.shape[-2]) & ~hidden
    elif mask is None:
        if not k.shape[-2]:
            return Weights(S, S.new_full(S.shape[:-1], float("-inf")))
        lse = S.logsumexp(-1)
        return Weights((S - lse.unsqueeze(-1)).exp(), lse)
    else:
        seen = visible(mask, k.shape[-2])
    if not k.shape[-2]:
        return Weights(S, S.new_full(S.shape[:-1], float("-inf")))
    empty = ~seen.any(-1)  # (*lead, 1, T)
    S = torch.where(seen | empty.unsqueeze(-1), S, float("-inf"))  # an empty row keeps finite logits and drops out below
    lse = S.logsumexp(-1)
    P = torch.where(seen, (S - lse.unsqueeze(-1)).exp(), 0)
    return Weights(P, torch.where(empty, float("-inf"), lse))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Attended:
    """Dense attention; keep (*lead, H, T, S) multiplies the weights (dropout: 0 or 1 / (1 - rate))."""
    P, lse = weigh(q, k, mask, scale=scale, bias=bias)
    out = mix(P if keep is None else P * keep, accurate(v)).to(v.dtype)
    return Attended(out, lse.expand(out.shape[:-1]))


def accurate(x: Tensor) -> Tensor:
    """float32 at least: the dtype that statistics are kept in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
