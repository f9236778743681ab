"""The "sdpa" kernels: torch's own F.scaled_dot_product_attention, as fast as torch is and composing as little as it does."""

import contextlib

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..masks import Mask
from . import reference

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
    seen = None if mask is None or causal else reference.visible(mask, k.shape[-2])
    if bias is not None:
        seen = bias.to(q.dtype) if seen is None else bias.to(q.dtype).masked_fill(~seen, float("-inf"))
    grouped = q.shape[-3] != k.shape[-3]
    flat = q.dim() == 3  # torch's fused kernels want an axis of batch
    if flat:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.squeeze(0) if flat else out
