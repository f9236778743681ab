"""Dense attention: the specification. Every other kernel is held against this page.

    S_ij = scale * q_i . k_j + bias_ij       over the keys that query i sees
    m_i = max_j S_ij        P_ij = exp(S_ij - m_i) / sum_j exp(S_ij - m_i)        out_i = sum_j P_ij v_j
    lse_i = m_i + log sum_j exp(S_ij - m_i)

The weights are not exp(S - lse): where m is large, the sum of the two in one number has lost the second.

O(T * S) memory, plain torch operations, so every transform of torch.func goes through at every order. A query that sees no key
has out = 0 and lse = -inf, with zero derivatives: what such a row would divide by is replaced before the division, not after.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import Mask
from ..records import Attended
from . import unseen
from .dtypes import accurate
from .products import product
from .unseen import Taken


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
    """The attention weights themselves, for those who plot them."""
    seen = _seen(mask, bias, k.shape[-2])
    return _weigh(unseen.take_out(q, k, k, mask if bias is None else seen), seen, scale, bias)


def _seen(mask: Mask | Tensor | None, bias: Tensor | None, S: int) -> Tensor | None:
    seen = None if mask is None else visible(mask, S)
    if bias is None:
        return seen
    number = bias != float("-inf")  # a bias of -inf hides the key, as in torch
    return number if seen is None else seen & number


def _weigh(x: Taken, seen: Tensor | None, scale: float | Tensor, bias: Tensor | None) -> Weights:
    """exp(S - m) / sum exp(S - m) with m the greatest logit of a row: as it cancels, it is a constant to every derivative."""
    S = logits(accurate(x.q, bias), accurate(x.k, bias), scale)
    if bias is not None:
        S = S + torch.where(bias == float("-inf"), 0, accurate(bias, x.q))
    if not x.k.shape[-2]:
        return Weights(S, S.new_full(S.shape[:-1], float("-inf")))
    empty = None
    if seen is not None:
        empty = ~seen.any(-1, keepdim=True)  # (*lead, 1, T, 1)
        spoilt = unseen.poison(x.bad_k, S, seen)
        S = S if spoilt is None else S * spoilt
        S = torch.where(seen | empty, S, float("-inf"))  # an empty row keeps finite logits and drops out below
    greatest = S.detach().amax(-1, keepdim=True)
    P = (S - greatest).exp()
    mass = P.sum(-1, keepdim=True)
    P, lse = P / mass, greatest + mass.log()
    if seen is not None and empty is not None:
        P, lse = torch.where(seen, P, 0), torch.where(empty, float("-inf"), lse)
    return Weights(P, lse.squeeze(-1))


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
    seen = _seen(mask, bias, k.shape[-2])
    x = unseen.take_out(q, k, v, mask if bias is None else seen)
    P, lse = _weigh(x, seen, scale, bias)
    P = P if keep is None else P * keep
    spoilt = unseen.poison(x.bad_v, P, seen)
    out = mix(P if spoilt is None else P * spoilt, accurate(x.v, bias)).to(v.dtype)
    return Attended(unseen.without_blind(out, x.blind), lse.expand(out.shape[:-1]))
