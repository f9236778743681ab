"""Dense attention: the specification, which every other kernel is tested against.

    S_ij = scale * q_i . k_j + bias_ij       over the keys that query i sees
    P_ij = exp(S_ij) / sum_j exp(S_ij)       out_i = sum_j P_ij v_j     lse_i = log sum_j exp(S_ij)

The weights are not computed as exp(S - lse): where the largest logit is large, a single
floating-point number lse = row_max + log(normalizer) loses the log of the normalizer to rounding.

O(T * S) memory, plain torch operations, so it composes with every transform of torch.func at every
order. A query that sees no key has out = 0 and lse = -inf, with zero derivatives: the divisor of
such a row is replaced before the division, not after.
"""

import torch
from torch import Tensor

from ..masks import Mask
from ..records import Attended
from . import dropout, products, unseen
from .dtypes import accurate
from .request import Kernel, Request
from .unseen import Taken


def logits(q: Tensor, k: Tensor, scale: float | Tensor, seen: Tensor | None = None) -> Tensor:
    """scale * q @ k.mT as (*lead, H, T, S); query heads become rows, so that k is not repeated.

    Args:
        q: (*lead, H, T, D).
        k: (*lead, K, S, D).
        scale: factor of the logits.
        seen: booleans that broadcast to the logits, or None; derivatives of hidden pairs are then
            zero, even where an operand is NaN.
    """
    H, T, D = q.shape[-3:]
    K = k.shape[-3]
    # torch.unflatten: torch.compile cannot trace Tensor.unflatten under a default device
    rows = q * scale
    if H != K:
        rows = torch.unflatten(rows, -3, (K, H // K)).flatten(-3, -2)  # (*lead, K, G T, D)
    if seen is not None and products.hides(
        seen, q, k, *([scale] if isinstance(scale, Tensor) else [])
    ):
        S = products.MaskedDot.apply(rows, k, _rows(seen, H, T, k.shape[-2], K))
    else:
        S = products.product(rows, k.mT)
    return S if H == K else torch.unflatten(S, -2, (H // K, T)).flatten(-4, -3)


def mix(P: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """P @ v as (*lead, H, T, Dv); v is not repeated for its query heads; seen as in `logits`."""
    H, T, S = P.shape[-3:]
    K = v.shape[-3]
    rows = P if H == K else torch.unflatten(P, -3, (K, H // K)).flatten(-3, -2)
    if seen is not None and products.hides(seen, P, v):
        out = products.MaskedSum.apply(rows, v, _rows(seen, H, T, S, K))
    else:
        out = products.product(rows, v)
    return out if H == K else torch.unflatten(out, -2, (H // K, T)).flatten(-4, -3)


def _rows(seen: Tensor, H: int, T: int, S: int, K: int) -> Tensor:
    """Booleans for (*lead, H, T, S), reshaped to the rows of `logits`, (*lead, K, H / K T, S)."""
    seen = seen.reshape(*[1] * (3 - seen.dim()), *seen.shape)
    seen = seen.expand(*seen.shape[:-3], H, T, S)
    return seen if H == K else torch.unflatten(seen, -3, (K, H // K)).flatten(-3, -2)


def visible(mask: Mask | Tensor, S: int) -> Tensor:
    """The mask as booleans that broadcast against (*lead, H, T, S)."""
    return mask.dense(S).unsqueeze(-3) if isinstance(mask, Mask) else mask


def weigh(
    q: Tensor,
    k: Tensor,
    mask: Mask | Tensor | None,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The attention weights, (*lead, H, T, S) in float32 at least."""
    seen = _seen(mask, bias, k.shape[-2])
    return _weigh(unseen.take_out(q, k, None, seen), seen, scale, bias, wants_lse=False)[0]


def _seen(mask: Mask | Tensor | None, bias: Tensor | None, S: int) -> Tensor | None:
    seen = None if mask is None else visible(mask, S)
    if bias is None:
        return seen
    number = bias != float("-inf")  # a bias of -inf hides the key, as in torch
    return number if seen is None else seen & number


def _weigh(
    x: Taken, seen: Tensor | None, scale: float | Tensor, bias: Tensor | None, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The weights (*lead, H, T, S), and lse (*lead, H, T) if it is wanted."""
    S = logits(accurate(x.q, bias), accurate(x.k, bias), scale, seen)
    if not x.k.shape[-2]:
        return S, S.new_full(S.shape[:-1], float("-inf"))
    if bias is not None:
        S = S + torch.where(bias == float("-inf"), 0, accurate(bias, x.q))
    if seen is not None:
        spoilt = unseen.poison(x.bad_k, S, seen)
        S = S if spoilt is None else S * spoilt
        # an empty row keeps finite logits here and is set to zero below
        seen = seen if x.blind is None else seen | x.blind
        S = torch.where(seen, S, float("-inf"))
    P, lse = S.softmax(-1), None
    if wants_lse:
        # any constant gives the same result, so it has no derivative
        greatest = S.detach().amax(-1, keepdim=True)
        lse = (greatest + (S - greatest).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    if x.blind is not None:
        P = torch.where(x.blind, 0, P)
        lse = None if lse is None else torch.where(x.blind.squeeze(-1), float("-inf"), lse)
    return P, lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    wants_lse: bool = True,
) -> Attended:
    """Dense attention; lse is 0 where it is not wanted.

    keep (*lead, H, T, S) multiplies the weights (dropout: 0 or 1 / (1 - rate)).
    """
    seen = _seen(mask, bias, k.shape[-2])
    x = unseen.take_out(q, k, v, seen)
    P, lse = _weigh(x, seen, scale, bias, wants_lse)
    P = P if keep is None else P * keep
    spoilt = unseen.poison(x.bad_v, P, seen)
    out = mix(P if spoilt is None else P * spoilt, accurate(x.v, bias), seen).to(v.dtype)
    return Attended(
        unseen.without_blind(out, x.blind),
        out.new_zeros(()) if lse is None else lse.expand(out.shape[:-1]),
    )


def run(r: Request) -> Attended:
    """Dense attention as a kernel."""
    keep = None
    if r.dropout and r.key is not None:
        keys = dropout.head_keys(r.key, (*r.lead, r.q.shape[-3]))
        keep = dropout.keep(keys, slice(0, r.q.shape[-2]), slice(0, r.k.shape[-2]), r.dropout)
    return attend(
        r.q, r.k, r.v, r.mask, scale=r.scale, bias=r.bias, keep=keep, wants_lse=r.wants_lse
    )


REFERENCE = Kernel(
    "reference", "dense, the specification: every transform, O(T S) memory", lambda r: "", run
)
