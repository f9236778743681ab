"""Attention of flash_attn and xformers, by the kernels of this library.

    s_ij = softcap(scale q_i . k_j) - slope |d_i - j|       over max(low_i, d_i - left) <= j
                                                             and j < min(high_i, d_i + right + 1)

d_i is the key on the diagonal of query i, aligned with the last key; low_i and high_i are the ends
of its text. Tensors have axes (B, T, H, D), or (tokens, H, D) for texts behind one another.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import masks
from ..core import errors
from ..kernels import attention, attention_with_score
from ..masks import Mask

Draw = Callable[[float], Tensor | None]  # the rate of dropout -> a key


class Rows(NamedTuple):
    """Of each query: the key on its diagonal, and the first and last keys of its text; (T,)."""

    diagonal: Tensor
    low: Tensor
    high: Tensor


def flash_attn_func(
    draw: Draw, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """flash_attn.flash_attn_func: q (B, T, H, D), k and v (B, S, K, D)."""
    T, S = q.shape[-3], k.shape[-3]
    i = torch.arange(T, device=q.device)
    rows = Rows(i + S - T, torch.zeros_like(i), torch.full_like(i, S))
    return _flash(draw, "flash_attn_func", q, k, v, rows, *args, **kwargs)


def flash_attn_kvpacked_func(
    draw: Draw, q: Tensor, kv: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """flash_attn.flash_attn_kvpacked_func: kv (B, S, 2, K, D)."""
    return flash_attn_func(draw, q, *kv.unbind(-3), *args, **kwargs)


def flash_attn_qkvpacked_func(draw: Draw, qkv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """flash_attn.flash_attn_qkvpacked_func: qkv (B, T, 3, H, D)."""
    return flash_attn_func(draw, *qkv.unbind(-3), *args, **kwargs)


def flash_attn_varlen_func(
    draw: Draw,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """flash_attn.flash_attn_varlen_func: tokens of all texts (T, H, D), with their offsets."""
    if kwargs.pop("block_table", None) is not None:
        errors.fail("flash_attn_varlen_func", "block_table", "None", "one", "Gather the pages.")
    begin_q, begin_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    i = torch.arange(q.shape[0], device=q.device)
    text = torch.searchsorted(begin_q[1:].contiguous(), i, right=True)
    low, high = begin_k[text], begin_k[text + 1]
    rows = Rows(i - begin_q[text + 1] + high, low, high)
    return _flash(draw, "flash_attn_varlen_func", q, k, v, rows, *args, **kwargs)


def _flash(
    draw: Draw,
    door: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of the queries of `rows`; deterministic it is always."""
    if return_attn_probs:
        errors.fail(door, "return_attn_probs", "False", True, "Use fa.attention_weights.")
    left, right = window_size[0], 0 if causal else window_size[1]
    start = rows.low if left < 0 else torch.maximum(rows.low, rows.diagonal - left)
    stop = rows.high if right < 0 else torch.minimum(rows.high, rows.diagonal + right + 1)
    mask = Mask(start.unsqueeze(-1), torch.maximum(start, stop).unsqueeze(-1))
    q, k, v = (x.movedim(-3, -2) for x in (q, k, v))
    if not softcap and alibi_slopes is None:
        key = draw(dropout_p)
        out = attention(q, k, v, mask, scale=softmax_scale, dropout=dropout_p, key=key)
        return out.movedim(-2, -3)
    if dropout_p:
        errors.fail(door, "dropout_p", "0 with softcap or alibi_slopes", dropout_p, "Set it to 0.")

    def score(
        s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, diagonal: Tensor, *slopes: Tensor
    ) -> Tensor:
        s = softcap * torch.tanh(s / softcap) if softcap else s
        for slope in slopes:  # (H,), or (B, H)
            far = (diagonal[i] - j).abs()
            s = s - (slope[h] if slope.dim() == 1 else slope[b, h]) * far
        return s

    slopes = () if alibi_slopes is None else (alibi_slopes,)
    parameters = (rows.diagonal, *slopes)
    out = attention_with_score(q, k, v, score, mask, scale=softmax_scale, parameters=parameters)
    return out.out.movedim(-2, -3)


def memory_efficient_attention(
    draw: Draw,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """xformers.ops.memory_efficient_attention: (B, T, D), (B, T, H, D) or (B, T, G, H, D).

    Causal masks are intervals; other classes of masks become a dense bias, as they materialize it.
    """
    q, k, v = (x.unsqueeze(-3) if x.dim() == 3 else x.movedim(1, -2) for x in (query, key, value))
    T, S = q.shape[-2], k.shape[-2]
    mask, bias = None, attn_bias
    align = CAUSAL.get(type(attn_bias).__name__)
    if align is not None:
        mask, bias = (
            masks.causal(T, S, align=align, offset=torch.zeros((), dtype=torch.int64)),
            None,
        )
    elif attn_bias is not None and not isinstance(attn_bias, Tensor):
        bias = attn_bias.materialize((*q.shape[:-1], S), dtype=q.dtype, device=q.device)
    elif isinstance(attn_bias, Tensor) and query.dim() == 3:
        bias = attn_bias.unsqueeze(-3)
    out = attention(q, k, v, mask, scale=scale, bias=bias, dropout=p, key=draw(p))
    out = out.squeeze(-3) if query.dim() == 3 else out.movedim(-2, 1)
    return out if output_dtype is None else out.to(output_dtype)


CAUSAL = {
    "LowerTriangularMask": "upper",
    "LowerTriangularFromBottomRightMask": "lower",
}

ENTRY_POINTS = {  # module -> functions of it
    "flash_attn": (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
    ),
    "xformers.ops": (memory_efficient_attention,),
}
