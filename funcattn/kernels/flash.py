"""The "flash" kernel: from the public arguments to the closed family and back.

Scale goes into q, groups of query heads become an axis that k lacks, masks get axes for the heads. Inside a compile the family is
behind `nonstrict_trace`: Dynamo would otherwise inline the Functions, or refuse them.
"""

import torch
from torch import Tensor

from ..masks import Mask
from ..records import Attended
from . import dropout, torch_fused
from .algebra import ONES, Output, Sweep, Term
from .choice import Request
from .family import Attend, run
from .primitives import Plan, like


def attend(r: Request) -> Attended:
    """Attention by the closed family."""
    extra = mask_tensors(r)
    q = r.q * r.scale
    if r.q.shape[-3] == r.k.shape[-3]:
        k, v = r.k, r.v
    else:
        q, k, v = _grouped(q, r), r.k.unsqueeze(-3), r.v.unsqueeze(-3)
    bias = [] if r.bias is None else [_pairs(r.bias, r)]
    fused = not bias and not r.dropout and (r.mask is None or r.causal) and not torch_fused.obstacle(r.q, r.k, r.v)
    plan = Plan(len(extra), bool(bias), fused, r.causal)
    if r.dropout and r.key is not None:
        keys = dropout.head_keys(r.key, (*r.lead, r.q.shape[-3]))
        keys = keys if q.dim() == r.q.dim() else keys.unflatten(-3, (r.k.shape[-3], -1))
        out, lse = _traced(_dropped, plan, r.dropout, keys, q, k, v, *extra, *bias)
    else:
        out, lse = _traced(_attend, plan, q, k, v, *extra, *bias)
    lse = lse.squeeze(-1)
    if out.dim() == r.q.dim() and len(r.lead) + 3 == out.dim():
        return Attended(out, lse.expand(out.shape[:-1]))
    H, T = r.q.shape[-3:-1]
    return Attended(out.reshape(*r.lead, H, T, out.shape[-1]), lse.expand(out.shape[:-1]).reshape(*r.lead, H, T))


def mask_tensors(r: Request) -> list[Tensor]:
    """The mask as tensors of the family: intervals with axes for the heads, or booleans of pairs."""
    if r.mask is None:
        return []
    if not isinstance(r.mask, Mask):
        return [_pairs(r.mask, r)]
    heads = -3 if r.q.shape[-3] == r.k.shape[-3] else (-3, -3)
    spread = lambda x: x.unsqueeze(-3) if heads == -3 else x.unsqueeze(-3).unsqueeze(-3)
    return [spread(r.mask.start), spread(r.mask.stop)]


def _grouped(x: Tensor, r: Request) -> Tensor:
    """(*lead, H, A, B) as (*lead, K, H / K, A, B)."""
    return x.unflatten(-3, (r.k.shape[-3], -1))


def _pairs(x: Tensor, r: Request) -> Tensor:
    """A tensor that broadcasts to (*lead, H, T, S), with the family's axes."""
    x = x.reshape(*[1] * (3 - x.dim()), *x.shape) if x.dim() < 3 else x
    if r.q.shape[-3] == r.k.shape[-3]:
        return x
    return x.unsqueeze(-3) if x.shape[-3] == 1 else _grouped(x, r)


def _attend(plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return Attend.apply(plan, *tensors)


def _dropped(plan: Plan, rate: float, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The output is the sweep over P with the dropped weights; the log-sum-exp does not know of dropout."""
    q, k, v, *extra = tensors
    whole, lse = Attend.apply(plan, *tensors)
    at = 3 + len(extra)
    spec = Sweep(
        (Output("query", (Term((), at),)),),
        mask=tuple(range(3, 3 + plan.masks)),
        bias=3 + plan.masks if plan.biased else ONES,
        dropout=at + 1,
        rate=rate,
    )
    return run(spec, [like(whole)], [q, k, lse, *extra, v, keys])[0], lse


def _traced(f, *args):  # noqa: ANN
    return f(*args)
