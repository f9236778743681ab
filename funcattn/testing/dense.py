"""Attention as its definition reads, in plain torch operations: what laws and tables hold a kernel against.

    S_ij = scale q_i . k_j + bias_ij        lse_i = log sum_j exp S_ij        out_i = sum_j exp(S_ij - lse_i) v_j

It shares no line with the library's own kernels, not even with "reference", so those can be held against it too. Keys are
repeated for the query heads that share them, logits are held whole: clear, and only for small sizes.
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
    """Attended(out (*lead, H, T, Dv), lse (*lead, H, T)); a query that sees no key has out = 0 and lse = -inf.

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
    S = torch.where(empty, 0, torch.where(hidden, NOTHING, S))  # what an empty row would divide by is replaced before it divides
    lse = S.logsumexp(-1, keepdim=True)
    P = torch.where(empty, 0, (S - lse).exp())
    out = P @ v
    lse = torch.where(empty, NOTHING, lse).squeeze(-1)
    return Attended(out, lse.expand(out.shape[:-1]))


def seen(mask: Mask | Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """Booleans (..., T, S) that broadcast to (*lead, H, T, S), True where the query sees the key."""
    T, S = q.shape[-2], k.shape[-2]
    if mask is None:
        return torch.ones(T, S, dtype=torch.bool, device=q.device)
    dense = mask.dense(S).unsqueeze(-3) if isinstance(mask, Mask) else mask
    return dense.expand(torch.broadcast_shapes(dense.shape, (T, S)))
