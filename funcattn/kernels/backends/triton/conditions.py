"""What the Triton kernels cannot run, and why."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...closed.algebra import ONES, Contraction, DenseFactor, places
from .. import WIDEST
from . import tuning
from .addresses import width
from .language import INTERPRETED

# factors per term: value, gradient, jvp and hvp; for more, blocks of torch operations run
ORDERS = 2


def why_not_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], bias: Tensor | None = None
) -> str:
    """The reason why the attention kernel cannot run, or ""."""
    if len(mask) == 1 or bias is not None:
        return "it reads a T x S matrix"
    return _why_not([q, k, v])


def why_not_attend_jvp(q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor]) -> str:
    """The reason why the kernel for value and tangent cannot run, or ""."""
    return why_not_attend(q, k, v, mask) or (
        ""
        if tuning.of_attend_jvp(q, v)
        else f"two passes are faster for {q.dtype} and so wide heads"
    )


def why_not_contract(contraction: Contraction, tensors: Sequence[Tensor]) -> str:
    """The reason why these kernels cannot run a contraction, or ""."""
    terms = [term for output in contraction.outputs for term in output.terms]
    summands = [summand for term in terms for factor in term.factors for summand in factor]
    if (
        len(contraction.mask) == 1
        or contraction.bias != ONES
        or any(isinstance(summand, DenseFactor) for summand in summands)
    ):
        return "it reads a T x S matrix"
    if any(output.side == "pair" for output in contraction.outputs):
        return "it writes a T x S matrix"
    if any(len(term.factors) > ORDERS for term in terms):
        return f"it has more than {ORDERS} factors"
    query, key, _ = places(contraction)
    read = [tensors[p] for p in sorted(query | key)]
    if (
        sum(width(x.shape[-1]) for x in read if x.dtype == torch.float32 and x.shape[-1] > 1)
        > tuning.MOST
    ):
        return f"it reads more than {tuning.MOST} features of float32"
    return _why_not(read)


def _why_not(tensors: Sequence[Tensor]) -> str:
    if not tensors[0].is_cuda and not (INTERPRETED and tensors[0].device.type == "cpu"):
        return f"it is on {tensors[0].device.type}"
    if (
        tensors[0].is_cuda
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(tensors[0].device) < (8, 0)
    ):
        return "the card is older than compute capability 8.0"
    if any(x.dtype not in (torch.float32, torch.float16, torch.bfloat16) for x in tensors):
        return "it is in float64"
    if any(x.shape[-1] > WIDEST for x in tensors):
        return f"it has more than {WIDEST} features"
    return ""
