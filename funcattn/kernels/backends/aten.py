"""The "aten" backend: torch's fused CPU kernels, which return the log-sum-exp, and their backward.

They know one mask, the plain causal one, and give a hidden key the weight zero, which times NaN is
NaN: for other masks, and where a result is not finite, the functions here return None.

They take four axes: batch groups of the layout become examples, row groups become heads that share
one key head by a stride of zero. Only the gradients of k and v are repeated in memory, one for each
query head until they are summed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Layout, broadcast, fold, group_sizes, in_rows, plan, unfold
from .masking import is_finite
from .torch_blocks import is_far

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The reason why torch's fused kernel cannot run on these, or ""."""
    if q.device.type != "cpu":
        return f"on {q.device.type}: torch's fused kernel is for the CPU"
    if v.shape[-1] != q.shape[-1]:
        return "values and keys differ in head size"
    if is_empty(q, k, v):
        return "a size is zero"  # the kernel divides by it
    return ""


def why_not_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], bias: Tensor | None
) -> str:
    """The reason why it cannot attend under this form of mask, or "" where the mask may be
    causal.
    """
    if bias is not None or len(mask) == 1:
        return "it reads a T x S matrix"
    return why_not(q, k, v)


def is_empty(*tensors: Tensor) -> bool:
    """True where one of the tensors has no elements."""
    return not all(map(Tensor.numel, tensors))


def is_causal(mask: Sequence[Tensor], S: int) -> bool:
    """True where intervals (*ones, T, 1) are those of the plain causal mask: query i sees the keys
    0..i.
    """
    if len(mask) != 2 or mask[0].shape[-1] != 1 or mask[0].numel() != mask[0].shape[-2]:
        return False
    start, stop = (x.flatten() for x in mask)
    last = torch.arange(1, len(stop) + 1, device=stop.device).clamp(max=S)
    return not bool(start.any()) and torch.equal(stop.clamp(max=S), last)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor] | None:
    """out (*lead, T, D) and lse (*lead, T, 1); None for a mask that is not causal, or hidden
    NaN.
    """
    if mask and not is_causal(mask, k.shape[-2]):
        return None
    out, lse = _attend(q, k, v, scale, bool(mask))
    return (out, lse) if not mask or is_finite([out]) else None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    lead = broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    layout = plan([q.shape[:-2]], [k.shape[:-2], v.shape[:-2]], [lead])
    out, lse = _forward(
        _four(q, layout), _four(k, layout), _four(v, layout), 0.0, causal, scale=scale
    )
    lse_lead = broadcast(q.shape[:-2], k.shape[:-2])
    lse = lse.reshape(*layout.sizes, q.shape[-2], 1)
    if lse_lead != lead:  # only values have this axis, so its log-sum-exps are equal
        lse = lse[
            tuple(
                slice(0, 1) if n == 1 else slice(None) for n in group_sizes(tuple(lse_lead), layout)
            )
        ]
    return unfold(
        out.reshape(*layout.sizes, *out.shape[-2:]), layout, (*lead, *out.shape[-2:])
    ), unfold(lse, layout, (*lse_lead, *lse.shape[-2:]))


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, R, D) and lse (B, R, 1) of q (B, R, D), k and v (B, S, D), without a layout."""
    of = lambda x: in_rows(x.unsqueeze(1))
    out, lse = _forward(of(q), of(k), of(v), 0.0, False, scale=scale)
    return out.squeeze(1), lse.squeeze(1).unsqueeze(-1)


def attend_vjp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Sequence[Tensor],
    lse: Tensor,
    g: Tensor,
    out: Tensor,
    scale: float,
    shapes: Sequence[Sequence[int]],
) -> list[Tensor] | None:
    """Gradients of q, k and v, in the given shapes, for the cotangent g of out.

    None for a mask that is not causal, hidden NaN, or an lse that is too large to be one number.
    """
    if is_far(lse) or (mask and not is_causal(mask, k.shape[-2])):
        return None
    grads = _attend_vjp(shapes, q, k, v, lse, g, out, scale, bool(mask))
    return grads if not mask or is_finite(grads) else None


def _attend_vjp(
    shapes: Sequence[Sequence[int]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    g: Tensor,
    out: Tensor,
    scale: float,
    causal: bool,
) -> list[Tensor]:
    lead = [x.shape[:-2] for x in (q, lse, g, out)]
    layout = plan(lead, [k.shape[:-2], v.shape[:-2]], [tuple(s[:-2]) for s in shapes])
    of = lambda x: _four(x, layout)
    grads = _backward(
        of(g),
        of(q),
        of(k),
        of(v),
        of(out),
        of(lse).squeeze(-1).contiguous(),
        0.0,
        causal,
        scale=scale,
    )
    full = [
        unfold(x.reshape(*layout.sizes, *x.shape[-2:]), layout, (*layout.lead, *x.shape[-2:]))
        for x in grads
    ]
    return [
        x.sum_to_size(tuple(s)) if x.dim() >= len(s) else x
        for x, s in zip(full, shapes, strict=True)
    ]


def _four(x: Tensor, layout: Layout) -> Tensor:
    """(*lead, A, B) as (batch groups, row groups, A, B), expanded by strides of zero."""
    x = fold(x, layout).expand(*layout.sizes, *x.shape[-2:])
    x = x.reshape(
        math.prod(layout.sizes[: layout.batch]),
        math.prod(layout.sizes[layout.batch :]),
        *x.shape[-2:],
    )
    return in_rows(x)
