"""Values of small problems without a mask: one call of the native operator.

With 16 queries the general route costs more than the arithmetic, in looking at the arguments and in
laying out heads. The questions here, answered yes, make all of that unnecessary.
"""

import torch
from torch import Tensor

from .. import native
from ..core.autograd import has_tangent, is_jit_traced
from ..records import Attended
from . import dispatch
from .backends.native import FLOATS, attend_rows
from .closed.operators import plain
from .request import SMALL


def attend_small(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor | None) -> Attended | None:
    """Attention without mask, bias or dropout by one call, or None where more has to be asked.

    Args:
        q, k, v: unchecked arguments, as in `attention`.
        scale: as in `attention`.
    """
    if torch.compiler.is_compiling() or is_jit_traced():
        return None
    if not (type(q) is type(k) is type(v) is Tensor) or q.is_nested or k.is_nested or v.is_nested:
        return None
    shape, size = q.shape, k.shape
    if len(shape) < 3 or size != v.shape or shape[:-2] != size[:-2] or shape[-1] != size[-1]:
        return None
    if not 0 < shape[-2] * size[-2] <= SMALL or q.dtype not in FLOATS or not q.numel():
        return None
    if not (q.dtype is k.dtype is v.dtype and q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    factor = shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(factor, float) or not 1e-30 < abs(factor) < 1e30:
        return None
    tensors = q, k, v
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if recorded or has_tangent(tensors) or dispatch.current() is not None or native.load():
        return None
    if torch.is_autocast_enabled("cpu") or not plain(tensors):
        return None
    out, lse = attend_rows(q, k, v, factor)
    return Attended(out, lse.squeeze(-1))
