"""Removing keys and queries that a mask hides before they are multiplied, since 0 * NaN is NaN.

For kernels made of differentiable torch operations. Keys and values that no query sees are set to
zero, and so are queries that see no key: neither they nor their tangents and cotangents then reach
an output. A key that some queries see and that holds NaN or infinity is set to zero as well, and
the weights of those queries become NaN. Where values are concrete and there is nothing to remove,
the inputs are returned unchanged.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..masks import Mask
from .backends.layout import broadcast
from .backends.masking import is_finite


class Taken(NamedTuple):
    """q, k and v with hidden rows set to zero, and boolean flags of these rows (None: none)."""

    q: Tensor
    k: Tensor
    v: Tensor
    blind: Tensor | None = None  # (*lead, H or 1, T, 1): the query sees no key
    bad_k: Tensor | None = None  # (*lead, K, S, 1): the key is not finite
    bad_v: Tensor | None = None  # the same of the value


def take_out(
    q: Tensor, k: Tensor, v: Tensor | None, mask: Mask | Tensor | None, *, all_keys: bool = True
) -> Taken:
    """Zero what the mask hides of q (*lead, H, T, D), k (*lead, K, S, D) and v (*lead, K, S, Dv).

    Args:
        q, k, v: queries, keys and values; v may be None.
        mask: broadcasts to (*lead, H, T, S).
        all_keys: False leaves keys that some query sees as they are, finite or not, which saves a
            pass over them; the caller must then replace their logits at hidden pairs.
    """
    if mask is None or not k.shape[-2] or not q.shape[-2]:
        return Taken(q, k, k if v is None else v)
    known = _look(mask) if isinstance(mask, Tensor) else None
    blind = hidden = None
    if (
        known is None
        or known.dim() < 2
        or not bool(known.any(-1).all())
        or not bool(known.any(-2).all())
    ):
        keys, queries = (
            _of_intervals(mask, k.shape[-2]) if isinstance(mask, Mask) else _of_booleans(mask, q, k)
        )
        blind = _unless_none(queries.logical_not())
        hidden = _unless_none(
            _fitting(
                keys,
                k.shape[:-3] if v is None else broadcast(k.shape[:-3], v.shape[:-3]),
                k.shape[-3],
            ).logical_not()
        )
    if blind is not None:
        q = torch.where(blind, 0, q)
    if hidden is not None:
        k, v = torch.where(hidden, 0, k), v if v is None else torch.where(hidden, 0, v)
    # all keys that the one query does not see are already zero
    if q.shape[-2] == 1 and _is_one_row(mask):
        return Taken(q, k, k if v is None else v, blind)
    k, bad_k = _finite(k) if all_keys else (k, None)
    v, bad_v = (k, None) if v is None else _finite(v)
    return Taken(q, k, v, blind, bad_k, bad_v)


def _is_one_row(mask: Mask | Tensor) -> bool:
    """True where a mask of one query is the same for all heads and examples."""
    lead = mask.start.shape[:-2] if isinstance(mask, Mask) else mask.shape[:-2]
    return all(n == 1 for n in lead)


def poison(bad: Tensor | None, like: Tensor, seen: Tensor | None) -> Tensor | None:
    """Factor of weights (*lead, H, T, S): NaN for a visible bad key (*lead, K, S, 1), else 1."""
    if bad is None:
        return None
    bad = bad.mT.repeat_interleave(like.shape[-3] // bad.shape[-3], -3)  # (*lead, H, 1, S)
    return torch.where(bad if seen is None else bad & seen, torch.nan, 1.0).to(like.dtype)


def without_blind(out: Tensor, blind: Tensor | None) -> Tensor:
    """out (*lead, H, T, Dv) with zeros for queries that see no key, and zero derivatives there."""
    return out if blind is None else torch.where(blind, 0, out)


def _of_intervals(mask: Mask, S: int) -> tuple[Tensor, Tensor]:
    """Which keys (*lead, 1, S, 1) are seen by a query, which queries (*lead, 1, T, 1) see a key."""
    start = mask.start.clamp(0, S)
    stop = torch.maximum(mask.stop.clamp(0, S), start)
    queries = (start < stop).any(-1)
    ends = torch.cat([start.flatten(-2), stop.flatten(-2)], -1)
    # +1 where an interval begins, -1 where it ends
    steps = torch.cat([torch.ones_like(start), -torch.ones_like(stop)], -2).flatten(-2)
    count = (
        steps.new_zeros(*steps.shape[:-1], S + 1)
        .scatter_add(-1, ends, steps)
        .cumsum(-1)
        .narrow(-1, 0, S)
    )
    return (count > 0).unsqueeze(-2).unsqueeze(-1), queries.unsqueeze(-2).unsqueeze(-1)


def _of_booleans(mask: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """As `_of_intervals`, for booleans: (*lead, K or 1, S, 1) and (*lead, H or 1, T, 1)."""
    (H, T, _), (K, S, _) = q.shape[-3:], k.shape[-3:]
    mask = mask.reshape(*[1] * (3 - mask.dim()), *mask.shape)
    keys = mask.any(-2)  # (*lead, H or 1, S or 1)
    keys = keys if keys.shape[-2] == 1 or H == K else keys.unflatten(-2, (K, H // K)).any(-2)
    queries = mask.any(-1, keepdim=True)
    return keys.expand(*keys.shape[:-1], S).unsqueeze(-1), queries.expand(*queries.shape[:-2], T, 1)


def _fitting(keys: Tensor, lead: tuple[int, ...], K: int) -> Tensor:
    """Flags of keys, any() over the axes that keys and values lack: (*lead', K or 1, S, 1).

    A key that is shared by several examples counts as seen if one of them sees it.
    """
    while keys.dim() - 3 > len(lead):
        keys = keys.any(0)
    for axis in range(-3 - len(lead), -3):
        if keys.dim() >= -axis and lead[axis + 3] == 1 and keys.shape[axis] != 1:
            keys = keys.any(axis, keepdim=True)
    return keys.any(-3, keepdim=True) if K == 1 and keys.shape[-3] != 1 else keys


def _unless_none(flags: Tensor) -> Tensor | None:
    """None where it is known that no flag is True in any row under vmap."""
    known = _look(flags)
    return None if known is not None and not bool(known.any()) else flags


def _finite(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x with zeros for rows that hold NaN or infinity, and flags of these rows."""
    known = _look(x)
    if known is not None and is_finite([known]):
        return x, None
    bad = x.isfinite().all(-1, keepdim=True).logical_not()
    return torch.where(bad, 0, x), bad


def _look(x: Tensor) -> Tensor | None:
    """The concrete values, of all rows under vmap; None off the CPU, to avoid synchronizing."""
    return errors.peek(x) if x.device.type == "cpu" else None
