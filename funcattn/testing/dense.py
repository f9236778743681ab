"""Attention by its definition, in plain torch operations: the reference of laws and tables.

    S_ij = scale q_i . k_j + bias_ij
    lse_i = log sum_j exp S_ij        out_i = sum_j exp(S_ij - lse_i) v_j

It has no code in common with the library's kernels, not even "reference", so it can test these too.
Keys are repeated for their query heads and all logits are in memory: for small sizes only.
"""

import torch
from torch import Tensor

from ..masks import Mask
from ..records import Attended

NOTHING = float("-inf")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
) -> Attended:
    """Attended(out (*lead, H, T, Dv), lse (*lead, H, T)); a query that sees no key has out = 0 and
    lse = -inf.

    Example:
        >>> q = k = v = torch.ones(1, 2, 4)
        >>> attend(q, k, v).lse
        tensor([[2.6931, 2.6931]])
    """
    G, D = q.shape[-3] // k.shape[-3], q.shape[-1]
    k, v = k.repeat_interleave(G, -3), v.repeat_interleave(G, -3)
    S = q @ k.mT * (D**-0.5 if scale is None else scale)  # (*lead, H, T, S)
    hidden = ~seen(mask, q, k)
    if bias is not None:
        hidden = hidden | (bias == NOTHING)
        S = S + torch.where(bias == NOTHING, 0, bias)
    empty = hidden.all(-1, keepdim=True)
    S = torch.where(empty, 0, torch.where(hidden, NOTHING, S))  # no NaN from rows without keys
    lse = S.logsumexp(-1, keepdim=True)
    P = torch.where(empty, 0, (S - lse).exp())
    out = P @ v
    lse = torch.where(empty, NOTHING, lse).squeeze(-1)
    return Attended(out, lse.expand(out.shape[:-1]))


def seen(mask: Mask | Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """Bool, broadcasts to (*lead, H, T, S): True where the query sees the key."""
    T, S = q.shape[-2], k.shape[-2]
    if mask is None:
        return torch.ones(T, S, dtype=torch.bool, device=q.device)
    dense = mask.dense(S).unsqueeze(-3) if isinstance(mask, Mask) else mask
    return dense.expand(torch.broadcast_shapes(dense.shape, (T, S)))
