"""The "sdpa" kernels: torch's own F.scaled_dot_product_attention, as fast as torch is and composing as little as it does."""

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..masks import Mask
from . import reference
from .backends import aten, layout

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    *,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
    backend: str = "",
) -> Tensor:
    """Attention by torch's kernel, the one of a backend where it is named.

    causal says that the mask is the plain causal one, which torch need not be shown.
    """
    if aten.is_empty(q, k, v):  # which torch's kernels do not take
        return reference.attend(q, k, v, mask, scale=scale, bias=bias).out
    seen = None if mask is None or causal else reference.visible(mask, k.shape[-2])
    if bias is not None:
        bias = bias.to(torch.promote_types(q.dtype, bias.dtype))  # added in the wider dtype
        seen = bias if seen is None else torch.where(seen, bias, float("-inf"))
    lead = layout.broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            layout.in_rows(_four(q, lead)),
            layout.in_rows(_four(k, lead)),
            layout.in_rows(_four(v, lead)),
            attn_mask=None if seen is None else _four(seen, lead),
            is_causal=causal,
            scale=scale,
            enable_gqa=bool(q.shape[-3] != k.shape[-3]),  # a tensor while torch.jit traces
        )
    return out.reshape(*lead, *out.shape[1:])


def _four(x: Tensor, lead: Sequence[int]) -> Tensor:
    """(*lead, H, A, B) with exactly one leading axis: with any other number torch takes its dense route unasked."""
    x = x.reshape(*[1] * (len(lead) + 3 - x.dim()), *x.shape)
    if all(n == 1 for n in x.shape[: len(lead)]):
        return x.reshape(1, *x.shape[-3:]).expand(math.prod(lead), *x.shape[-3:])
    return x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:])
