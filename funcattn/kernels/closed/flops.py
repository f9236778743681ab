"""FLOP formulas of the custom operations for torch.utils.flop_counter: 2 per multiply-add.

Counted as torch counts its attention: all pairs, including those that a mask hides; exponentials
and sums are free.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import operators, specs
from .algebra import ONES, Contraction, K, LowRankFactor, Q

Shape = Sequence[int]


def of_attend(q: Shape, k: Shape, v: Shape, *others: Shape) -> int:
    """FLOPs of q k^T and P v."""
    lse_lead = torch.broadcast_shapes(q[:-2], k[:-2], *(x[:-2] for x in others))
    lead = torch.broadcast_shapes(lse_lead, v[:-2])
    return 2 * q[-2] * k[-2] * (math.prod(lse_lead) * q[-1] + math.prod(lead) * v[-1])


def of_contract(contraction: Contraction, shapes: Sequence[Shape]) -> int:
    """FLOPs of the logits, of each factor once, and of each sum over P with values."""
    factors = {
        factor for output in contraction.outputs for term in output.terms for factor in term.factors
    }
    pairs = [
        s
        for factor in factors
        for s in factor
        if isinstance(s, LowRankFactor) and ONES not in (s.a, s.b)
    ]
    values = [
        value
        for side, terms in contraction.outputs
        if side != "pair"
        for value in {term.value for term in terms} - {ONES}
    ]
    width = (
        shapes[Q][-1]
        + sum(shapes[s.a][-1] for s in pairs)
        + sum(shapes[value][-1] for value in values)
    )
    return (
        2
        * math.prod(torch.broadcast_shapes(*(x[:-2] for x in shapes)))
        * shapes[Q][-2]
        * shapes[K][-2]
        * width
    )


@register_flop_formula(torch.ops.funcattn.attend)
def _(tensors: Sequence[Shape], *_: Any, **__: Any) -> int:
    return of_attend(*tensors)


@register_flop_formula(torch.ops.funcattn.contract)
def _(tensors: Sequence[Shape], spec: str, *_: Any, **__: Any) -> int:
    return of_contract(specs.decode(spec)[0], tensors)


@register_flop_formula(torch.ops.funcattn.attend_jvp)
def _(
    tensors: Sequence[Shape],
    scale: float,
    masks: int,
    has_tangent: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of the value, and those of its tangent without the logits, which are computed once."""
    q, k, v, *mask = tensors[: 3 + masks]
    of_shapes: Any = operators.tangent_contraction  # which reads nothing of a tensor
    there: Any = operators.spread
    tangents, lse = there(has_tangent, tensors[3 + masks :]), (*q[:-1], 1)
    spec = specs.AttendSpec(scale, masks)
    contraction, flat, _ = of_shapes(spec, (q, k, v, *mask), lse, tangents)
    logits = of_contract(contraction._replace(outputs=()), flat)
    return of_attend(q, k, v, *mask) + of_contract(contraction, flat) - logits
